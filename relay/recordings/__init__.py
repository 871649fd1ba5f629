"""5. The audio. Promise: kept whole or not at all, in constant memory, and never in the way of an event."""
