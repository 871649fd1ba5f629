"""`python -m tests.fakes`: `python -m relay.simulator` with fault injection and a scripted subscriber."""

from relay.simulator.__main__ import main
from tests.fakes import FAULTY
from tests.fakes.subscriber import ScriptedSubscriber

if __name__ == "__main__":
    main(fakes=FAULTY, subscriber_type=ScriptedSubscriber)
