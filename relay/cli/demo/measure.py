"""What the demo measures: calls that the providers list against events that the subscriber received."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from relay.domain.json import Json
from relay.simulator.accounts import SimulatedAccount
from relay.simulator.hook_log import Arrival, HookReport
from relay.simulator.nfon import FakeNfon
from relay.simulator.subscriber import VerifyingSubscriber
from relay.simulator.timeline import CallPlan

HOOK = "crm"


@dataclass(slots=True)
class ListedCall:
    """A call that a provider lists; `id` is its id there. The rest is known once its `call.completed` is delivered."""

    id: str
    account: SimulatedAccount
    plan: CallPlan
    contact: str = ""
    via: str = ""
    latency_s: float | None = None

    @property
    def outcome(self) -> str:
        return self.plan.disposition.lower().replace(" ", "_")

    @property
    def current(self) -> CallPlan:
        return self.account.plans[self.plan.rid]

    @property
    def has_recording(self) -> bool:
        return self.account.provider.has_recordings and self.current.recording_at is not None

    @property
    def has_transcript(self) -> bool:
        return isinstance(self.account.provider, FakeNfon) and self.plan.answered


@dataclass(frozen=True, slots=True)
class DeliveredEvent:
    """An event that the subscriber received and verified. `latency_s` counts from when the provider listed the call.

    `repeated`: the same event again, with the same id; its sender was killed before the answer was recorded.
    """

    at: datetime
    type: str
    call_id: str
    latency_s: float | None
    detail: str
    url: str = ""
    provider: str = ""
    via_stream: bool = False
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class SourceTotals:
    provider: str
    listed: int
    delivered: int
    via_stream: int = 0
    p50_s: float | None = None

    def line(self) -> str:
        p50 = "" if self.p50_s is None else f", p50 {self.p50_s:.2f} s"
        stream = f", {self.via_stream} by stream" if self.via_stream else ""
        return f"  {self.provider:<10} {self.listed} listed, {self.delivered} delivered{p50}{stream}"


@dataclass(slots=True)
class Measurements:
    accounts: Sequence[SimulatedAccount]
    subscriber: VerifyingSubscriber
    calls: dict[str, ListedCall] = field(default_factory=dict)
    events: list[DeliveredEvent] = field(default_factory=list)
    kills: int = 0
    _event_ids: set[str] = field(default_factory=set)

    @property
    def several(self) -> bool:
        return len(self.accounts) > 1

    def update(self) -> Sequence[ListedCall | DeliveredEvent]:
        """Read both ends; gives what is new, calls first."""
        listed = [
            ListedCall(call_id, account, plan)
            for account in self.accounts
            for plan in account.visible()
            if (call_id := account.call_id(plan)) not in self.calls
        ]
        listed.sort(key=lambda call: call.plan.visible_at)
        for call in listed:
            self.calls[call.id] = call
            if call.has_transcript and isinstance(call.account.provider, FakeNfon):
                call.account.provider.transcribe(call.account.key, call.plan.rid)
        # The subscriber keeps every arrival, in order, and each becomes one event here.
        delivered = [self._delivered(arrival) for arrival in self.subscriber.arrivals(HOOK)[len(self.events) :]]
        self.events += delivered
        return [*listed, *delivered]

    def _delivered(self, arrival: Arrival) -> DeliveredEvent:
        document = self.subscriber.event(HOOK, arrival.event_id) or {}
        data: Json = document.get("data") or {}
        content: Json = data.get("call") or {}
        via = str((document.get("context") or {}).get("via") or "")
        call = self.calls.get(arrival.provider_call_id or "")
        latency_s = None if call is None else _latency_s(arrival, call.current)
        contact = _contact(content)
        if call is not None:
            call.contact = contact or call.contact
            if arrival.type == "call.completed" and call.latency_s is None:
                call.latency_s, call.via = latency_s, via
        repeated = arrival.event_id in self._event_ids
        self._event_ids.add(arrival.event_id)
        url = ""
        detail = contact or (call.plan.outside_number if call else "")
        match arrival.type:
            case "call.recording.completed":
                url = str((content.get("recording") or {}).get("url") or "")
            case "call.updated":
                detail = ", ".join(data.get("changes") or {})
            case "call.transcript.completed":
                detail = str((content.get("transcription") or {}).get("summary") or detail)
        return DeliveredEvent(
            at=arrival.at,
            type=arrival.type,
            call_id=arrival.provider_call_id or "",
            latency_s=latency_s,
            detail="again, with the same id" if repeated else detail,
            url=url,
            provider=call.account.name if call and self.several else "",
            via_stream=via == "stream",
            repeated=repeated,
        )

    def is_complete(self) -> bool:
        """Whether every call is listed and delivered, with its recording and its transcript."""
        plans = ((account, plan) for account in self.accounts for plan in account.plans.values())
        if any(plan.visible_at > account.provider.clock() for account, plan in plans):
            return False
        recorded = {call.id for call in self.calls.values() if call.has_recording}
        transcribed = {call.id for call in self.calls.values() if call.has_transcript}
        return (
            not self.report().lost(self.calls)
            and recorded <= self._calls_with("call.recording.completed", "call.recording.failed")
            and transcribed <= self._calls_with("call.transcript.completed")
        )

    def _calls_with(self, *types: str) -> set[str]:
        return {event.call_id for event in self.events if event.type in types}

    def report(self) -> HookReport:
        return self.subscriber.report(HOOK)

    def latencies_s(self) -> list[float]:
        return _latencies_s(self.calls.values())

    def recording_url(self) -> str:
        return next((event.url for event in reversed(self.events) if event.url), "")

    def totals(self) -> Sequence[SourceTotals]:
        report = self.report()
        totals: list[SourceTotals] = []
        for account in self.accounts:
            calls = {call.id: call for call in self.calls.values() if call.account is account}
            totals.append(
                SourceTotals(
                    provider=account.name,
                    listed=len(calls),
                    delivered=len(calls) - len(report.lost(calls)),
                    via_stream=sum(call.via == "stream" for call in calls.values()),
                    p50_s=percentile(_latencies_s(calls.values()), 50),
                )
            )
        return totals

    def summary(self, *, interrupted: bool = False) -> "Summary":
        return Summary(
            report=self.report(),
            listed=self.calls.keys(),
            recordings=sum(call.has_recording for call in self.calls.values()),
            transcripts=sum(call.has_transcript for call in self.calls.values()),
            latencies_s=self.latencies_s(),
            sources=self.totals(),
            kills=self.kills,
            interrupted=interrupted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result of a demo. A call is lost when a provider lists it and its `call.completed` was not delivered.

    `recordings` and `transcripts` are how many there are to deliver. `interrupted`: the last deliveries were not
    awaited, so what is missing is not lost.
    """

    report: HookReport
    listed: Collection[str]
    recordings: int
    transcripts: int = 0
    latencies_s: Sequence[float] = ()
    sources: Sequence[SourceTotals] = ()
    kills: int = 0
    interrupted: bool = False

    @property
    def undelivered(self) -> Sequence[str]:
        return self.report.lost(self.listed)

    @property
    def delivered(self) -> int:
        return len(self.listed) - len(self.undelivered)

    @property
    def problems(self) -> Sequence[str]:
        """What must not happen, a sentence each. A kill between sending and recording excuses a duplicate."""
        problems: list[str] = []
        if not self.interrupted:
            if self.undelivered:
                problems.append(f"{len(self.undelivered)} calls were lost: {', '.join(self.undelivered[:5])}")
            if not self.listed:
                problems.append("no call was made, so nothing is proven; use a longer --for or more --calls-per-minute")
            else:
                silent = [source.provider for source in self.sources if not source.listed]
                problems += [f"no call was made at {provider}; use a longer --for" for provider in silent]
        return [*problems, *self.report.problems()]

    def lines(self) -> list[str]:
        report = self.report
        lines = [
            f"calls        {len(self.listed)} listed, {self.delivered} delivered",
            *(source.line() for source in self.sources if len(self.sources) > 1 or source.via_stream),
            f"events       {report.events}",
            f"recordings   {report.types.get('call.recording.completed', 0)} of {self.recordings}",
        ]
        if self.transcripts:
            lines.append(f"transcripts  {report.types.get('call.transcript.completed', 0)} of {self.transcripts}")
        failures = report.signature_failures
        lines += [
            f"duplicates   {sum(report.duplicates.values())}",
            f"order        {'broken' if report.order_violations else 'correct for every call'}",
            f"ids          {'changed' if report.changed_ids else 'one per event'}",
            f"signatures   {f'{failures} did not verify' if failures else 'all verified'}",
        ]
        p50_s, p99_s = percentile(self.latencies_s, 50), percentile(self.latencies_s, 99)
        if p50_s is not None and p99_s is not None:
            lines.append(f"latency      p50 {p50_s:.2f} s, p99 {p99_s:.2f} s from listed to delivered")
        if self.kills:
            lines.append(f"chaos        {self.kills} × kill -9, each followed by a restart")
        if self.interrupted and self.undelivered:
            lines.append(f"interrupted  {len(self.undelivered)} calls were not yet delivered")
        lines += [f"✗ {problem}" for problem in self.problems]
        if not self.problems and not self.interrupted:
            lines.append("✓ nothing was lost")
        return lines


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value that `percent` of them do not exceed (nearest rank); None when there are none."""
    if not values:
        return None
    rank = math.ceil(percent / 100 * len(values))
    return sorted(values)[max(rank, 1) - 1]


def _latencies_s(calls: Iterable[ListedCall]) -> list[float]:
    return [call.latency_s for call in calls if call.latency_s is not None]


def _latency_s(arrival: Arrival, plan: CallPlan) -> float:
    since = plan.visible_at
    if arrival.type in ("call.updated", "call.transcript.completed"):
        since = max((change.at for change in plan.changes if change.at <= arrival.at), default=since)
    return max((arrival.at - since).total_seconds(), 0.0)


def _contact(call: Json) -> str:
    contact = call.get("contact") or {}
    if contact.get("lookup_status") != "matched":
        return ""
    return ", ".join(str(contact[name]) for name in ("name", "organization") if contact.get(name))
