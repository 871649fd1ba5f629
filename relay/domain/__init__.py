"""The words of the domain as pure values and rules; imports nothing else of the relay but `relay.errors`."""
