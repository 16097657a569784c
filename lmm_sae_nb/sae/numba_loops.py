"""Loops over sparse latents, compiled for the CPU by numba: float32, one thread each, without the GIL.

`kernels` calls them and documents what they compute. It gives each thread a range, from `first` to before `last`,
of the tokens, latents or tiles to write. The results of a range do not depend on where other ranges begin, so they
are the same to the bit for any number of threads.

A tile is WIDTH columns of all tokens of a block, next to each other in memory. It stays in the core's cache while
the loop goes over the latents. So each weight is read from memory once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numba
import numpy as np

WIDTH = 128  # columns of a tile: 1,024 tokens are 512 kB

ONE, TINY = np.float32(1), np.finfo(np.float32).tiny
SUMS = {"reassoc", "contract", "nsz"}  # sums in any order, so that they vectorise; NaN stays NaN


def _compile(function: Callable) -> Callable:
    function = inspect.unwrap(function)  # without the check of types under which tests import this
    options = dict(nogil=True, fastmath=SUMS, error_model="numpy")
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep machine code in: compile again in each process
        return numba.njit(**options)(function)


# TopK.


@_compile
def _kth_largest(values, n, k):
    """Return the k-th largest of the first n values, none NaN; reorders them. Free of branches, which would be slow."""
    start = 0
    while True:
        a, b, c = values[start], values[(start + n) // 2], values[n - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        above = start
        for i in range(start, n):
            value = values[i]
            values[i], values[above] = values[above], value
            above += value > pivot
        if above >= k:
            n = above
            continue
        same = above
        for i in range(above, n):
            value = values[i]
            values[i], values[same] = values[same], value
            same += value == pivot
        if same >= k:
            return pivot
        start = same


@_compile
def select(pre, bias, k, acts, indices, first, last):
    """Write TopK of ReLU(pre + bias), token by token; a token with a NaN gets activations NaN.

    Latents are divided into at least k groups. The k-th largest of the groups' maxima is a bound that at least k
    latents reach. With eight groups for each of the k, few more latents reach it: the exact choice is among these.
    """
    n = pre.shape[1]
    rows = max(1, n // (8 * k))
    groups = (n + rows - 1) // rows  # latent i is in group i % groups
    maxima, scratch = np.empty(groups, np.float32), np.empty(n, np.float32)
    values, places = np.empty(n + 1, np.float32), np.empty(n + 1, np.int32)
    for t in range(first, last):
        row, total = pre[t], np.float32(0)
        maxima[:] = -np.inf
        for start in range(0, n, groups):
            part, shift = row[start : start + groups], bias[start : start + groups]
            for i in range(len(part)):
                value = part[i] + shift[i]
                part[i] = value
                total += value
                maxima[i] = value if value > maxima[i] else maxima[i]
        if np.isnan(total) and np.isnan(row).any():  # infinities of both signs also make the total NaN
            acts[t], indices[t] = np.nan, np.arange(k)
            continue
        scratch[:groups] = maxima
        bound = _kth_largest(scratch, groups, k)
        reach = 0
        for group in range(groups):
            if maxima[group] >= bound:
                for i in range(group, n, groups):
                    values[reach], places[reach] = row[i], i
                    reach += row[i] >= bound
        scratch[:reach] = values[:reach]
        bound = _kth_largest(scratch, reach, k)
        kept, ties = 0, k
        for i in range(reach):
            ties -= values[i] > bound
        for i in range(reach):
            if values[i] > bound or (values[i] == bound and ties > 0):
                ties -= values[i] == bound
                acts[t, kept], indices[t, kept] = max(values[i], np.float32(0)), places[i]
                kept += 1


# The pattern by latent, and sums along it.


@_compile
def transpose(indices, starts, order):
    """Sort a flat list of latents: the places of latent j become order[starts[j]:starts[j + 1]], ascending.

    Return False if an index is no latent; `order` is then useless.
    """
    n = len(starts) - 1
    starts[:] = 0
    for j in indices:
        if j < 0 or j >= n:
            return False
        if j + 2 <= n:
            starts[j + 2] += 1
    for j in range(2, n + 1):
        starts[j] += starts[j - 1]
    for place in range(len(indices)):  # starts[j + 1] goes from where latent j begins to where it ends
        j = indices[place]
        order[starts[j + 1]] = place
        starts[j + 1] += 1
    return True


@_compile
def into_tiles(x, tiles, first, last):
    """Copy x into tiles."""
    for tile in range(first, last):
        start = tile * WIDTH
        for t in range(len(x)):
            for i in range(min(WIDTH, x.shape[1] - start)):
                tiles[tile, t, i] = x[t, start + i]


@_compile
def decode(starts, tokens, weights, rows, out, first, last):
    """Write out[t] = sum of weight * rows[j] over the latents j of token t; `first` to `last` are tiles of out."""
    n_tokens, width = out.shape
    sums = np.empty((n_tokens, WIDTH), np.float32)
    for start in range(first * WIDTH, min(last * WIDTH, width), WIDTH):
        columns = min(WIDTH, width - start)
        sums[:] = 0
        for j in range(len(starts) - 1):
            row = rows[j, start : start + columns]
            place, end = starts[j], starts[j + 1]
            while place < end:
                weight, total = weights[place], sums[tokens[place]]
                for i in range(columns):
                    total[i] += weight * row[i]
                place += 1
        out[:, start : start + columns] = sums[:, :columns]


@_compile
def sum_by_latent(starts, tokens, weights, tiles, out, add, first, last):
    """Write out[j] = sum of weight * x[t] over the tokens t that have latent j; with `add`, add it to out[j]."""
    width = out.shape[1]
    for tile in range(len(tiles)):
        start = tile * WIDTH
        columns = min(WIDTH, width - start)
        for j in range(first, last):
            total = out[j, start : start + columns]
            if not add:
                total[:] = 0
            place, end = starts[j], starts[j + 1]
            while place + 3 < end:
                a, b, c, d = weights[place], weights[place + 1], weights[place + 2], weights[place + 3]
                w, x = tiles[tile, tokens[place]], tiles[tile, tokens[place + 1]]
                y, z = tiles[tile, tokens[place + 2]], tiles[tile, tokens[place + 3]]
                for i in range(columns):
                    total[i] += a * w[i] + b * x[i] + c * y[i] + d * z[i]
                place += 4
            while place < end:
                a, w = weights[place], tiles[tile, tokens[place]]
                for i in range(columns):
                    total[i] += a * w[i]
                place += 1


@_compile
def sum_and_multiply(starts, tokens, weights, rows, tiles, out, products, add, first, last):
    """Do `sum_by_latent`, and write products[place] = rows[j] . x[t] for every place: both gradients of a decoder."""
    width = out.shape[1]
    products[starts[first] : starts[last]] = 0
    for tile in range(len(tiles)):
        start = tile * WIDTH
        columns = min(WIDTH, width - start)
        for j in range(first, last):
            total, row = out[j, start : start + columns], rows[j, start : start + columns]
            if not add:
                total[:] = 0
            place, end = starts[j], starts[j + 1]
            while place + 1 < end:
                a, b, p, q = weights[place], weights[place + 1], np.float32(0), np.float32(0)
                x, y = tiles[tile, tokens[place]], tiles[tile, tokens[place + 1]]
                for i in range(columns):
                    total[i] += a * x[i] + b * y[i]
                    p += row[i] * x[i]
                    q += row[i] * y[i]
                products[place] += p
                products[place + 1] += q
                place += 2
            if place < end:
                a, p, x = weights[place], np.float32(0), tiles[tile, tokens[place]]
                for i in range(columns):
                    total[i] += a * x[i]
                    p += row[i] * x[i]
                products[place] += p


# One step of Adam.


@_compile
def project(grad, rows, along, squares, first, last):
    """Write along[j] = grad[j] . rows[j] and squares[j] = ||grad[j] - along[j] rows[j]||^2."""
    for j in range(first, last):
        g, row, product, square = grad[j], rows[j], np.float32(0), np.float32(0)
        for i in range(len(row)):
            product += g[i] * row[i]
        for i in range(len(row)):
            across = g[i] - product * row[i]
            square += across * across
        along[j], squares[j] = product, square


@_compile
def adam(weights, grad, along, mean, square, scale, beta1, beta2, eps, rate, lift, unit, first, last):
    """Do Adam on scale * (grad[j] - along[j] weights[j]), row by row; with `unit`, scale the rows to length 1 after it.

    rate: learning rate over the mean's bias, float32.
    lift: 1 / sqrt of the bias of the mean square, float32.
    """
    for j in range(first, last):
        row, g, m, v = weights[j], grad[j], mean[j], square[j]
        length, product = np.float32(0), along[j]
        for i in range(len(row)):
            value = scale * (g[i] - product * row[i])
            m[i] += (ONE - beta1) * (value - m[i])
            v[i] = beta2 * v[i] + (ONE - beta2) * value * value
            row[i] -= rate * m[i] / (np.sqrt(v[i]) * lift + eps)
            length += row[i] * row[i]
        if unit:
            length = np.sqrt(length)
            for i in range(len(row)):
                row[i] /= max(length, TINY)
