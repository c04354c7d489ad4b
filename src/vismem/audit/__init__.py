"""The audit: does memory carry content, or is it only extra computation?

Memories are replaced and the answers compared (`interventions`, `effects`); linear probes read them (`probes`); they
are compared with each other (`structure`); later tokens' attention to them is measured (`attention`). `verdicts`
turns the numbers into words, `report` writes one page, and `audit.audit` runs everything and can be resumed.
"""
