"""How launchers and ranks meet, agree, stop, find out who is missing, and compare their replicas.

| file | what lives there |
| --- | --- |
| `accelerator` | the Accelerator of a rank, and how a rank ends |
| `communication` | what ranks tell each other: JSON and bytes, the statistics of a step |
| `meeting` | the protocol by which several parties meet in a store |
| `job_token` | the secret that the parties of a job share, and who is refused without it |
| `launcher_rendezvous` | launchers of several hosts meet: `accelerate launch --rdzv_backend lrd` |
| `rank_rendezvous` | the ranks of a start meet and compare what must be equal |
| `network` | addresses, interfaces and open ports |
| `roll_call` | which rank is missing when a collective fails |
| `replica_check` | whether all ranks hold the same bits |
| `signals` | signals that ask a run to save and leave |
| `hardware` | what this host has: cores, bf16 |
"""
