"""3. What we know. Promise: the ledger is the truth; a step is done whole or not at all, whoever dies in the middle."""
