"""How fast models are: prefill and decode on this machine, beside what the machine could do at the most."""
