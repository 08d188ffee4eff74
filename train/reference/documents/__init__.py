"""The documents model: a LLaVA whose pretrained decoder, SmolLM2-135M-Instruct, reads rendered pages."""
