"""4. Who was on the call. Promise: a contact never holds an event longer than its hold, and is never guessed."""
