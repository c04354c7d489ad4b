"""The audit: is it memory, or just some latent computation?

Memories are replaced and answers compared (`interventions`, `effects`), read by probes (`probes`), compared with each
other (`structure`) and watched being read (`gaze`); rules make verdicts in words of the numbers (`verdicts`), and one
page shows all of it (`report`). `run.audit` leads through it and keeps what is done.
"""
