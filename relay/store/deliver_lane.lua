-- The hooks of the deliver lane (see exchange.lua): an item is an ordering key; its pending events go out in their order.
--
-- ARGV   [2] event TTL s
-- FIELDS event        the event that was attempted
--        state        what is known of its delivery from now on
--        dead_letter  there when no further attempt is made
--        filtered     there when the subscription does not receive the event after all: its delivery is forgotten
--
-- Races closed here:
-- * an event is published while the one before it is attempted: the settle finds it pending and makes the item due again.
-- * an event is erased while it is attempted: nothing of the attempt is written, and the events after it go on.
-- * a subscription is removed from the configuration while events wait: the lane drops them; they are owed still, should
--   it be added again.

local event_ttl = tonumber(ARGV[2])

local function write_state(sub, eid, state)
  redis.call('HSET', 'relay:event:' .. eid, sub, state)
  redis.call('EXPIRE', 'relay:event:' .. eid, event_ttl)
end

-- When the ordering key is due again: at once with further events; without any it is not owed any more.
local function due_of_next(sub, ordering_key, now)
  if redis.call('EXISTS', k_pending(sub, ordering_key)) == 1 then return now end
  settle_owed('deliver', sub, ordering_key)
end

function hooks.load(sub, ordering_key)
  if is_removed('subscription', sub) then return nil end
  local eid = redis.call('ZRANGE', k_pending(sub, ordering_key), 0, 0)[1]
  if not eid then
    settle_owed('deliver', sub, ordering_key)
    return nil
  end
  local event = redis.call('HMGET', 'relay:event:' .. eid, '=', sub)
  return { eid, event[1] or '', event[2] or '' }
end

function hooks.on_intent(sub, ordering_key, fields)
  if not redis.call('ZSCORE', k_pending(sub, ordering_key), fields.event) then return false end
  write_state(sub, fields.event, fields.state)
  return true
end

function hooks.on_settle(sub, ordering_key, fields, retry_at, put_again, now)
  if not fields.event then return earliest(retry_at, put_again) or due_of_next(sub, ordering_key, now) end
  local pending = redis.call('ZSCORE', k_pending(sub, ordering_key), fields.event)
  if pending and fields.state then
    write_state(sub, fields.event, fields.state)
    if fields.dead_letter then redis.call('ZADD', 'relay:dead', now, sub .. '\31' .. fields.event) end
  end
  if pending and fields.filtered then
    redis.call('HDEL', 'relay:event:' .. fields.event, sub)
    redis.call('ZREM', 'relay:deliveries-of:' .. sub, fields.event)
  end
  if pending and retry_at then return earliest(retry_at, put_again) end
  redis.call('ZREM', k_pending(sub, ordering_key), fields.event)
  return due_of_next(sub, ordering_key, now)
end

function hooks.on_quarantine(sub, ordering_key, put_again, now)
  local eid = redis.call('ZRANGE', k_pending(sub, ordering_key), 0, 0)[1]
  if not eid then return put_again or due_of_next(sub, ordering_key, now) end
  local state = redis.call('HGET', 'relay:event:' .. eid, sub)
  if not state or state == '' then state = '{"s":"waiting","t":' .. string.format('%.0f', now) .. '}' end
  write_state(sub, eid, (string.gsub(state, '"s":"%a+"', '"s":"poison"', 1)))
  redis.call('ZADD', 'relay:dead', now, sub .. '\31' .. eid)
  redis.call('ZREM', k_pending(sub, ordering_key), eid)
  return due_of_next(sub, ordering_key, now)
end
