"""The generated world: what exists, how it looks, what can be asked.

In reading order: `concepts` (every word), `art` (how a thing looks), `scenes` (what is where), `questions` (what can
be asked, with the answer), `datasets` (data sets on disk), `rendered` (scenes in memory with what each patch shows),
`pairs` (a scene again, with one thing changed).
"""
