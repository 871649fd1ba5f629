"""2. When to ask and how far back. Promise: no call is missed, and never more than our share of a limit is used."""
