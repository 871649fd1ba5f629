"""3. What the relay knows, in domain terms. A step is done completely or not at all, whichever process dies in it."""
