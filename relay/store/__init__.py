"""3. What we know, in domain terms: `store.Store`. A step is done completely or not at all, whoever dies in between."""
