-- Take room for one request from every bucket that it counts in, or from none.
--
-- KEYS   the bucket of the credential, the bucket of the way out
--        (HASH tat: theoretical arrival time, ms; closed: no request before, ms; all: every purpose counts in it)
-- ARGV   emission interval ms (float; 0: no limit is known, only what is closed is closed), tolerance ms of this
--        purpose, TTL s, 1 when it counts by way out in any case, the largest tolerance of all ms, longest closing ms
-- REPLY  0 when the request may go, else ms to wait
--
-- GCRA: a bucket lets a request go when its arrival time is at most `tolerance` ahead of now. With interval W/(N-B) and
-- tolerance B times that, no window of W holds more than N requests, wherever it starts.
--
-- Races closed here: two processes take the last room of a limit; a request that is refused by the second bucket does
-- not use up the first; the store's clock is set back, and what was written before seems to lie hours ahead.

local t = redis.call('TIME')
local now = tonumber(t[1]) * 1000 + tonumber(t[2]) / 1000
local interval, tolerance, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[5])
local buckets = (ARGV[4] == '1' or redis.call('HEXISTS', KEYS[2], 'all') == 1) and 2 or 1
local wait, tats = 0, {}
for b = 1, buckets do
  local state = redis.call('HMGET', KEYS[b], 'tat', 'closed')
  local closed = tonumber(state[2]) or 0
  if closed - now <= tonumber(ARGV[6]) then wait = math.max(wait, closed - now) end
  if interval > 0 then
    local tat = math.max(tonumber(state[1]) or 0, now)
    if tat > now + most then
      tat = now + most
      redis.call('HSET', KEYS[b], 'tat', string.format('%.3f', tat))
    end
    tats[b] = tat + interval
    wait = math.max(wait, tats[b] - now - tolerance)
  end
end
if wait > 0 then return math.ceil(wait) end
for b = 1, buckets do
  if tats[b] then
    redis.call('HSET', KEYS[b], 'tat', string.format('%.3f', tats[b]))
    redis.call('EXPIRE', KEYS[b], ARGV[3])
  end
end
return 0
