"""Ask other models: the explainer, the refiner, the labeller and the judge of sections 2.2 and 3.2.

Read in this order: `questions` (question, reply, and what a chat is), `local` (a model in this process), `endpoint`
(a server of OpenAI's chat protocol), `recorded` (open one of the two, and keep every reply on disk).
"""
