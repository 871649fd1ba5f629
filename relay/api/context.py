"""The context that every handler gets, and the one place that decides which resources a caller may access.

What belongs to another tenant is answered exactly like what does not exist.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import uuid4

from relay.api.auth import Authenticator, Caller
from relay.api.problems import Problem, declared_in_configuration, not_found
from relay.delivery.subscriptions import Subscription
from relay.domain.json import Json
from relay.privacy.erase import Eraser
from relay.providers.source import Source
from relay.runtime import Runtime
from relay.store.calls import StoredCall
from relay.store.declarations import Declaration
from relay.store.jobs import Job, JobState
from relay.store.listings import Listing
from relay.store.store import Store

_JOB_EXPIRES_S: Final = 7 * 86_400

Kind = Literal["source", "subscription"]


@dataclass(frozen=True)
class ApiContext:
    """What every handler gets first."""

    runtime: Runtime
    authenticator: Authenticator
    eraser: Eraser
    now: Callable[[], datetime]
    closing: asyncio.Event
    streams: dict[asyncio.Task[Any], Caller]
    heartbeat_s: float
    write_timeout_s: float

    @property
    def store(self) -> Store:
        return self.runtime.store

    # --- access ------------------------------------------------------------------------------------------------------

    async def source(self, caller: Caller, source_id: str) -> Source:
        if source_id not in self.runtime.sources:
            await self.runtime.registry.load()  # another process may have created it a moment ago
        source = self.runtime.sources.get(source_id)
        if source is None or not caller.can_access(source.tenant):
            raise not_found("Source")
        return source

    async def subscription(self, caller: Caller, subscription_id: str) -> Subscription:
        if subscription_id not in self.runtime.subscriptions:
            await self.runtime.registry.load()
        subscription = self.runtime.subscriptions.get(subscription_id)
        if subscription is None or not caller.can_access(subscription.tenant):
            raise not_found("Subscription")
        return subscription

    async def call(self, caller: Caller, call_id: str) -> StoredCall:
        call = await self.store.calls.get(call_id)
        if call is None or not self.can_access_calls_of(caller, call.source_id):
            raise not_found("Call")
        return call

    async def event(self, caller: Caller, event_id: str) -> Json:
        document = await self.store.events.get(event_id)
        if document is None or not self.can_access_event(caller, document):
            raise not_found("Event")
        return document

    async def job(self, caller: Caller, job_id: str) -> Job:
        job = await self.store.jobs.get(job_id)
        if job is None or not caller.can_access(job.tenant or self._tenant_of(job)):
            raise not_found("Job")
        return job

    def sources(self, caller: Caller) -> list[Source]:
        return [source for source in self.runtime.sources.values() if caller.can_access(source.tenant)]

    def subscriptions(self, caller: Caller) -> list[Subscription]:
        return [
            subscription
            for subscription in self.runtime.subscriptions.values()
            if caller.can_access(subscription.tenant)
        ]

    def source_ids(self, tenant: str | None) -> list[str] | None:
        """List a tenant's sources; None for the operator, who also has the data of sources that are gone."""
        if tenant is None:
            return None
        return [source.id for source in self.runtime.sources.values() if source.tenant == tenant]

    def can_access_calls_of(self, caller: Caller, source_id: str) -> bool:
        source_ids = self.source_ids(caller.tenant)
        return source_ids is None or source_id in source_ids

    def can_access_event(self, caller: Caller, document: Json) -> bool:
        return caller.tenant is None or self.event_tenant(document) == caller.tenant

    def event_tenant(self, document: Json) -> str | None:
        """The owner of an event: that of the source or the subscription it is about."""
        data = document["data"]
        source_id = data["call"]["source_id"] if "call" in data else data.get("source", {}).get("id")
        if source_id is not None:
            source = self.runtime.sources.get(source_id)
            return source.tenant if source else None
        subscription = self.runtime.subscriptions.get(data.get("subscription", {}).get("id"))
        return subscription.tenant if subscription else None

    def events_of(self, tenant: str | None) -> Listing:
        """List the events of a tenant's sources; all of them for the operator."""
        source_ids = self.source_ids(tenant)
        return self.store.events.all() if source_ids is None else self.store.events.of_sources(source_ids)

    def _tenant_of(self, job: Job) -> str | None:
        source = self.runtime.sources.get(job.source or "")
        subscription = self.runtime.subscriptions.get(job.subscription or "")
        owner = source or subscription
        return owner.tenant if owner else None

    # --- declarations ------------------------------------------------------------------------------------------------

    async def declaration(
        self, caller: Caller, kind: Kind, name: str, *, hidden: Problem | None = None
    ) -> Declaration | None:
        """Read what was created at run time and may be changed by the caller; None when there is none.

        What the caller may not access raises `hidden`; without it, that is None too.
        """
        if self.runtime.registry.configured(kind, name):
            if caller.tenant is None:
                raise declared_in_configuration(name)
            declaration, accessible = None, False
        else:
            declaration = await self.store.declarations.get(kind, name)
            accessible = declaration is None or caller.can_access(declaration.tenant)
        if accessible:
            return declaration
        if hidden is not None:
            raise hidden
        return None

    async def existing_declaration(self, caller: Caller, kind: Kind, name: str) -> Declaration:
        """Read what was created at run time and may be changed by the caller; a Problem when there is none."""
        declaration = await self.declaration(caller, kind, name)
        if declaration is None:
            raise not_found(kind.capitalize())
        return declaration

    def created(self, kind: Kind, name: str) -> Declaration | None:
        """The declaration in force of what was created at run time; None for what the configuration declares."""
        if self.runtime.registry.configured(kind, name):
            return None
        return self.runtime.registry.declared[kind].get(name)

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def start_job(
        self,
        kind: str,
        *args: Any,
        caller: Caller,
        after: Sequence[Any] = (),
        source: str | None = None,
        subscription: str | None = None,
        since: str | None = None,
        until: str | None = None,
    ) -> Job:
        """Queue long work for a worker, which gets `args`, the job's id and `after`; the rest describes the job."""
        job = Job(
            f"{kind}-{uuid4().hex[:12]}",
            kind,
            JobState.QUEUED,
            tenant=caller.tenant,
            source=source,
            subscription=subscription,
            since=since,
            until=until,
        )
        # Recorded before it is queued: a worker may start it at once and writes its progress into the record.
        await self.store.jobs.create(job)
        await self.runtime.arq.enqueue_job(kind, *args, job.id, *after, _job_id=job.id, _expires=_JOB_EXPIRES_S)
        return job


def tenant_of_new(caller: Caller, requested: str | None) -> str | None:
    """Decide the owner of what a caller creates: a tenant's token creates only for its tenant."""
    if caller.tenant is None:
        return requested
    if requested not in (None, caller.tenant):
        raise Problem("invalid", "tenant: omit it; a tenant's token creates only for its own tenant.")
    return caller.tenant
