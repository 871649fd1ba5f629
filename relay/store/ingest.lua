-- Take rows of one poll (at most 50) into the ledger: what is new becomes a call, what changed becomes a new version.
--
-- KEYS   none
-- ARGV   source id, poll lease token ('' for a backfill), mapping version, via, call TTL s,
--        n, then n × (record key, day, day before, day after, call id, content hash, seed 1|0, finished 1|0,
--                     audio 1|0, started ms, packed record, packed raw row or ''),
--        last chunk 1|0, m, then m × (field, value) of the source, k, then k days of `seen` to forget
-- REPLY  false when the lease is not ours any more or the source is being removed (nothing was done), else one letter a
--        row:
--        n new, or seeded once and asked for by a backfill · c changed · k known · s seeded (known, not told) · r re-hashed after an upgrade
--
-- Races closed here:
-- * a poller that was thought dead wakes up: its token is old, nothing of its answer is taken and no cursor moves.
-- * a source is removed while a poll or a backfill reads it: nothing comes in behind the one who clears up.
-- * two pollers, or a poll and a backfill, bring the same row: `seen` and the call are written in the same step, so one
--   of them is new and the other known.
-- * a poll dies half way: the cursor moves with the last chunk only; the chunks before it are simply known next time.
-- * a call finishes while the relay is upgraded: a row that the new mapping writes otherwise is re-hashed in silence, but
--   not where that would swallow the end of the call.

local sid, token, mapping, via = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local call_ttl = tonumber(ARGV[5])
if redis.call('EXISTS', 'relay:removing:' .. sid) == 1 then return false end
if token ~= '' then
  local lease = lease_of('poll', '', sid)
  if not lease or lease.token ~= token then return false end
end

local now = now_ms()
local stamp = string.format('%.0f', now)
local answers = {}
local i = 7

local function k_seen(day) return 'relay:seen:' .. sid .. ':' .. day end

local function recall(key, days, cid)
  for _, day in ipairs(days) do
    local value = redis.call('HGET', k_seen(day), key)
    if value then return value, day end
  end
  local hash = redis.call('HMGET', 'relay:call:' .. cid, 'mapping', 'hash')
  if hash[1] and hash[2] then return hash[1] .. 'e' .. hash[2], nil end
end

local function remember(key, day, flag, hash, found_on)
  if found_on and found_on ~= day then redis.call('HDEL', k_seen(found_on), key) end
  redis.call('HSET', k_seen(day), key, mapping .. flag .. hash)
  redis.call('EXPIRE', k_seen(day), 7776000)
end

-- A holder may just have seen that there is nothing to fetch: then its lease becomes dirty, so that it looks again.
local function want_audio(cid)
  if redis.call('HEXISTS', 'relay:call:' .. cid, 'recording') == 1 then return end
  put('record', sid, cid, now, lease_of('record', sid, cid) and 'LT' or 'NX')
end

local function finishes(k_call, finished)
  return finished == '1' and redis.call('HGET', k_call, 'finished') == '0'
end

for n = 1, tonumber(ARGV[6]) do
  local key, day, cid, hash = ARGV[i], ARGV[i + 1], ARGV[i + 4], ARGV[i + 5]
  local seed, finished, audio = ARGV[i + 6] == '1', ARGV[i + 7], ARGV[i + 8] == '1'
  local started, record, raw = ARGV[i + 9], ARGV[i + 10], ARGV[i + 11]
  local known, found_on = recall(key, { day, ARGV[i + 2], ARGV[i + 3] }, cid)
  local k_call = 'relay:call:' .. cid
  i = i + 12
  local answer = 'k'
  local flag, old, by = nil, nil, nil
  if known then
    by, flag, old = string.match(known, '^(%d+)(%a)(.*)$')
  end

  local untold = flag == 's' or flag == 'u'
  if (not known and not seed) or (flag == 'u' and finished == '1' and old ~= hash)
    or (via == 'backfill' and untold and finished == '1') then
    redis.call('HSET', k_call, 'version', 1, 'source', sid, 'key', key, 'mapping', mapping, 'hash', hash,
      'finished', finished, 'started', started, 'first_seen', stamp, 'ready', stamp, 'via', via,
      'record', record, 'raw', raw)
    redis.call('EXPIRE', k_call, call_ttl)
    redis.call('ZADD', 'relay:calls', 'NX', now, cid)
    redis.call('ZADD', 'relay:calls:' .. sid, 'NX', now, cid)
    redis.call('HINCRBY', 'relay:counts', 'calls', 1)
    remember(key, day, 'e', hash, found_on)
    put('enrich', sid, cid, now, 'LT')
    if audio then want_audio(cid) end
    answer = 'n'
  elseif not known then
    remember(key, day, finished == '1' and 's' or 'u', hash, nil)
    answer = 's'
  elseif old == hash then
    if by ~= mapping or found_on ~= day then remember(key, day, flag, hash, found_on) end
    if by ~= mapping and redis.call('EXISTS', k_call) == 1 then redis.call('HSET', k_call, 'mapping', mapping) end
  elseif by ~= mapping and not finishes(k_call, finished) then
    remember(key, day, flag, hash, found_on)
    if redis.call('EXISTS', k_call) == 1 then redis.call('HSET', k_call, 'mapping', mapping, 'hash', hash) end
    answer = 'r'
  else
    remember(key, day, flag, hash, found_on)
    answer = 's'
    if flag == 'e' and redis.call('EXISTS', k_call) == 1 then
      if finishes(k_call, finished) then redis.call('HSET', k_call, 'ready', stamp) end
      if redis.call('HEXISTS', k_call, 'said') == 1 then
        redis.call('HSETNX', k_call, 'was', redis.call('HGET', k_call, 'record')) -- what was said repeats it no more
      end
      redis.call('HSET', k_call, 'mapping', mapping, 'hash', hash, 'finished', finished, 'record', record, 'raw', raw,
        'started', started)
      redis.call('HINCRBY', k_call, 'version', 1)
      redis.call('EXPIRE', k_call, call_ttl)
      put('enrich', sid, cid, now, 'LT')
      if audio then want_audio(cid) end
      answer = 'c'
    end
  end
  answers[n] = answer
end

if ARGV[i] == '1' then
  local fields = tonumber(ARGV[i + 1])
  for f = 0, fields - 1 do
    redis.call('HSET', 'relay:source:' .. sid, ARGV[i + 2 + 2 * f], ARGV[i + 3 + 2 * f])
  end
  i = i + 2 + 2 * fields
  for d = 1, tonumber(ARGV[i]) do redis.call('DEL', k_seen(ARGV[i + d])) end
end
return answers
