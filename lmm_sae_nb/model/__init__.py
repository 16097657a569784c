"""The model under study (section 2.1): from an image and a question to tokens, hidden states and answers.

In reading order: `token_kinds` (what each token is), `found_layouts` (find out how a family lays out image tokens),
`templates` (write turns as text), `prompts` (make a batch), `lmm` (load, run, generate), `crops` (run the vision tower
no more than needed), `hookpoints` (name the places that an SAE can read), `patch_states` (give the tower's states
tokens), `hooks` (read or rewrite a layer's output), `decoder_arguments` (cut what a decoder is called
with), `upper_layers` (run only what is above a layer), `conversations` (samples of several turns), `sample_checks`
(open and check training samples), `samples` (read them, make prompts), `data_identity` (find out whether samples
changed), `processor` (load a processor without video support).
"""
