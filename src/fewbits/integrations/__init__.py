"""fewbits in other libraries: each module here is for one of them, is imported by its users, and by nothing else."""
