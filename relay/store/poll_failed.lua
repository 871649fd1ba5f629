-- Record that a poll failed.
--
-- KEYS   none
-- ARGV   source id, poll lease token, error
-- REPLY  false when the lease is not ours any more (nothing was done), else
--        { failures in a row, since when (ms), the error was published 1|0, there was an error before 1|0 }
--
-- Race closed here: a poller that was taken for dead wakes up and would mark a source as failing that another one polls
-- with success: its token is old, nothing is written.

local sid, token, message = ARGV[1], ARGV[2], ARGV[3]
local lease = lease_of('poll', sid, sid)
if not lease or lease.token ~= token then return false end

local name = 'relay:source:' .. sid
local before = redis.call('HGET', name, 'error')
local failures = redis.call('HINCRBY', name, 'failures', 1)
if failures == 1 then
  redis.call('HSET', name, 'error_since', string.format('%.0f', wall_ms()), 'error_published', '0')
end
redis.call('HSET', name, 'error', message)
local state = redis.call('HMGET', name, 'error_since', 'error_published')
return { failures, tonumber(state[1]) or 0, state[2] == '1' and 1 or 0, before and before ~= '' and 1 or 0 }
