-- Drop the deliveries of a subscription that is being deleted, pending and past, some at a time.
--
-- KEYS   none
-- ARGV   subscription, most of each kind in this step
-- REPLY  how much is left; call again until 0
--
-- Races closed here:
-- * Events are published meanwhile: the subscription is disabled as `deleted` before, and publish.lua leaves it out.
-- * An attempt is in flight: its lease ends here, its settlement is refused.

local sub, most = ARGV[1], tonumber(ARGV[2])
local queues = { k_waiting('deliver', sub), k_leased('deliver', sub), k_owed_items('deliver', sub) }
for _, name in ipairs(queues) do
  for _, ordering_key in ipairs(redis.call('ZRANGE', name, 0, most - 1)) do
    redis.call('DEL', k_pending(sub, ordering_key))
    forget('deliver', sub, ordering_key)
    settle_owed('deliver', sub, ordering_key)
  end
end
for _, eid in ipairs(redis.call('ZRANGE', 'relay:deliveries-of:' .. sub, 0, most - 1)) do
  redis.call('HDEL', 'relay:event:' .. eid, sub)
  redis.call('ZREM', 'relay:dead', sub .. '\31' .. eid)
end
redis.call('ZREMRANGEBYRANK', 'relay:deliveries-of:' .. sub, 0, most - 1)
rescore('deliver', sub)
local left = redis.call('ZCARD', 'relay:deliveries-of:' .. sub)
for _, name in ipairs(queues) do left = left + redis.call('ZCARD', name) end
return left
