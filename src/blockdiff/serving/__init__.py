"""A model behind HTTP: `worker` computes, the other modules talk. Imports nothing heavy."""
