-- Write down that a poll failed.
--
-- KEYS   none
-- ARGV   source id, poll lease token, what is wrong
-- REPLY  false when the lease is not ours any more (nothing was done), else
--        { failures in a row, since when (ms), 1 when it was told, was there an error before 1|0 }
--
-- Race closed here: a poller that was thought dead wakes up and calls a source broken that another one polls with
-- success: its token is old, nothing is written.

local sid, token, wrong = ARGV[1], ARGV[2], ARGV[3]
local lease = lease_of('poll', '', sid)
if not lease or lease.token ~= token then return false end

local name = 'relay:source:' .. sid
local before = redis.call('HGET', name, 'error')
local failures = redis.call('HINCRBY', name, 'failures', 1)
if failures == 1 then
  redis.call('HSET', name, 'error_since', string.format('%.0f', now_ms()), 'error_told', '0')
end
redis.call('HSET', name, 'error', wrong)
local state = redis.call('HMGET', name, 'error_since', 'error_told')
return { failures, tonumber(state[1]) or 0, state[2] == '1' and 1 or 0, before and before ~= '' and 1 or 0 }
