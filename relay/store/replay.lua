-- Queue an event again for some subscriptions, in its old place of the order.
--
-- KEYS   none
-- ARGV   event id, ordering key, force 1|0, event TTL s, first state of the delivery, n subscriptions, then each
-- REPLY  a word a subscription: queued · waiting (already) · delivered (left alone) · disabled · gone (the event is)
--
-- Races closed here:
-- * The delivery makes its own next attempt meanwhile: it is waiting, and stays one delivery.
-- * It is acknowledged meanwhile: it is not repeated unless forced.
-- * The ordering key is leased, or waits for a later event's attempt: the replayed event takes the place of its number,
--   and only when that makes it the first is the ordering key due now; the backoff of another event is not shortened.

local lane, eid, ordering_key, force = 'deliver', ARGV[1], ARGV[2], ARGV[3] == '1'
local ttl = tonumber(ARGV[4])
local k_event = 'relay:event:' .. eid
local outcomes = {}
local exists = redis.call('HEXISTS', k_event, '=') == 1
if exists then redis.call('EXPIRE', k_event, ttl) end
local now = now_ms()
local sequence = redis.call('HGET', k_event, '#') or 0
for n = 1, tonumber(ARGV[6]) do
  local sub = ARGV[6 + n]
  local state = redis.call('HGET', k_event, sub)
  local outcome = 'queued'
  if not exists then
    outcome = 'gone'
  elseif redis.call('HGET', k_partition(lane, sub), 'disabled') then
    outcome = 'disabled'
  elseif redis.call('ZSCORE', k_pending(sub, ordering_key), eid) then
    outcome = 'waiting'
  elseif state and not force and (string.find(state, '^%d') or string.find(state, '"s":"delivered"', 1, true)) then
    outcome = 'delivered'
  else
    redis.call('HSET', k_event, sub, ARGV[5])
    redis.call('ZADD', 'relay:deliveries-of:' .. sub, 'NX', now, eid)
    redis.call('ZREM', 'relay:dead', sub .. '\31' .. eid)
    redis.call('ZREM', k_quarantine(lane), sub .. '\31' .. ordering_key)
    redis.call('ZADD', k_pending(sub, ordering_key), sequence, eid)
    local head = redis.call('ZRANGE', k_pending(sub, ordering_key), 0, 0)[1]
    owe(lane, sub, ordering_key, now, head == eid and 'LT' or 'NX')
  end
  outcomes[n] = outcome
end
return outcomes
