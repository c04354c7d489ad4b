"""The audit: is it memory, or just some latent computation?

Memories are replaced and answers compared (`interventions`, `effects`), read by probes (`probes`), compared with each
other (`structure`) and watched being read (`attention`). `verdicts` turns the numbers into words, `report` shows them
on one page, and `audit.audit` runs all of it and keeps what is done.
"""
