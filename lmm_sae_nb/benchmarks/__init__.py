"""Measurements that take too long for a page. `python -m lmm_sae_nb.benchmarks COMMAND` writes them into book/*.json.

In reading order: `systems` (one training step of this package and of three other libraries), `comparison` (all of
them at several shapes; command `training`), `cache_opening` (time to read a latent from a cold cache), `ablations`
(every active pair of held-out decisions, for notebook 07), `seeds` (the pages for several seeds of the SAE),
`tasks`, `panel_saes`, `panel_parts` and `panel` (every metric of many SAEs and methods), `faulty_server` (an endpoint
that misbehaves, for tests and for the fault campaign), `faults_endings`, `faults_world`, `faults_processes`,
`faults_endpoint`, `faults_pages`, `faults_files`, `faults_values` and `faults` (what happens after kills, on full
disks, with damaged files and strange inputs).
"""
