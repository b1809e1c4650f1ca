"""An accelerator lent in slices: a memory quota and a share of the turns for each client, for as long as its lease.

`Lender` is a service whose models are what clients load; what a client sees of it is its `Slice`.
"""
