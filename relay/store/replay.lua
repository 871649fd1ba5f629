-- Deliver an event again, or at last, to some subscriptions: in its old place of the call's order.
--
-- KEYS   none
-- ARGV   event id, subject, force 1|0, event TTL s, state to begin with, n subscriptions, then each
-- REPLY  a word a subscription: queued · waiting (already) · delivered (left alone) · disabled · gone (the event is)
--
-- Races closed here:
-- * the delivery goes on meanwhile (its own next attempt): it is waiting, and stays one delivery.
-- * it is heard meanwhile: it is not repeated unless forced.
-- * the subject is held or waits for a later event's attempt: the replayed event takes the place of its number, and
--   only when that makes it the head is the subject due now; the backoff of another head is not shortened.

local lane, eid, subject, force = 'deliver', ARGV[1], ARGV[2], ARGV[3] == '1'
local ttl = tonumber(ARGV[4])
local k_event = 'relay:event:' .. eid
local answers = {}
local exists = redis.call('HEXISTS', k_event, '=') == 1
if exists then redis.call('EXPIRE', k_event, ttl) end
local now = now_ms()
local sequence = redis.call('HGET', k_event, '#') or 0
for n = 1, tonumber(ARGV[6]) do
  local sub = ARGV[6 + n]
  local state = redis.call('HGET', k_event, sub)
  local answer = 'queued'
  if not exists then
    answer = 'gone'
  elseif redis.call('HGET', k_partition(lane, sub), 'disabled') then
    answer = 'disabled'
  elseif redis.call('ZSCORE', k_pending(sub, subject), eid) then
    answer = 'waiting'
  elseif state and not force and (string.find(state, '^%d') or string.find(state, '"s":"delivered"', 1, true)) then
    answer = 'delivered'
  else
    redis.call('HSET', k_event, sub, ARGV[5])
    redis.call('ZADD', 'relay:deliveries-of:' .. sub, 'NX', now, eid)
    redis.call('ZREM', 'relay:dead', sub .. '\31' .. eid)
    redis.call('ZREM', k_quarantine(lane), sub .. '\31' .. subject)
    redis.call('ZADD', k_pending(sub, subject), sequence, eid)
    local head = redis.call('ZRANGE', k_pending(sub, subject), 0, 0)[1]
    put(lane, sub, subject, now, head == eid and 'LT' or 'NX')
  end
  answers[n] = answer
end
return answers
