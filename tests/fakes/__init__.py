"""The relay's own fake providers and subscriber, with everything that can go wrong: faults, hostile replies, limits."""

from relay.simulator.accounts import Fakes
from tests.fakes.cinnox import FaultyCinnox
from tests.fakes.nfon import FaultyNfon
from tests.fakes.unpod import FaultyUnpod
from tests.fakes.webfones import FaultyWebFones

FAULTY: Fakes = {fake.name: fake for fake in (FaultyWebFones, FaultyUnpod, FaultyCinnox, FaultyNfon)}
