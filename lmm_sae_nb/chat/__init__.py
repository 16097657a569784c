"""Ask other models: the explainer, the refiner, the labeller and the judge of sections 2.2 and 3.2.

Read in this order: `questions` (question, and what a chat is), `replies` (reply, and how what a model sends back is
read), `local` (a model in this process), `endpoint` (a server of OpenAI's chat protocol), `connection` (one exchange
with it, within limits), `keys` (its key), `recorded` (open one of the two, and keep every reply on disk).
"""
