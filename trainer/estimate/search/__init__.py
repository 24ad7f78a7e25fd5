"""The fastest layout on a cluster among those that fit: `memory-estimate estimate.search=true`.

Read in order: `network` (collectives), `cost` (a step), `candidates` (layouts), `search`, `render`.
"""
