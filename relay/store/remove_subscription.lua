-- Forget what waits for a subscription that is being deleted, and what was told to it, a piece at a time.
--
-- KEYS   none
-- ARGV   subscription, most of each kind in this step
-- REPLY  how much is left; call again until 0
--
-- Races closed here:
-- * events are published meanwhile: the subscription is switched off as `deleted` before, and publish.lua leaves it out.
-- * an attempt is in flight: its lease ends here, its settle is refused.

local sub, most = ARGV[1], tonumber(ARGV[2])
for _, name in ipairs({ k_waiting('deliver', sub), k_leased('deliver', sub) }) do
  for _, subject in ipairs(redis.call('ZRANGE', name, 0, most - 1)) do
    redis.call('DEL', k_pending(sub, subject))
    forget('deliver', sub, subject)
  end
end
local told = redis.call('ZRANGE', 'relay:deliveries-of:' .. sub, 0, most - 1)
for _, eid in ipairs(told) do
  redis.call('HDEL', 'relay:event:' .. eid, sub)
  redis.call('ZREM', 'relay:dead', sub .. '\31' .. eid)
end
redis.call('ZREMRANGEBYRANK', 'relay:deliveries-of:' .. sub, 0, most - 1)
rescore('deliver', sub)
return redis.call('ZCARD', k_waiting('deliver', sub)) + redis.call('ZCARD', k_leased('deliver', sub))
  + redis.call('ZCARD', 'relay:deliveries-of:' .. sub)
