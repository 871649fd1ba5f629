-- Ingest rows of one poll (at most 50): new ones become calls, changed ones new versions of their call.
--
-- KEYS   none
-- ARGV   source id, poll lease token ('' for a backfill), mapping version, via, call TTL s,
--        n, then n × (record key, day, day before, day after, call id, content hash, hash of the provider's own words,
--                     seed 1|0|r, finished 1|0, audio 1|0, started ms, packed record, packed raw row or ''),
--        (seed r: restore the call if it is lost)
--        last chunk 1|0, m, then m × (field, value) of the source, k, then k days of `seen` to drop
-- REPLY  false when the lease is not ours any more or the source is being removed (nothing was done), else a word a row:
--        new (also: seeded before, and asked for by a backfill) · changed · known · seeded (remembered, not published) ·
--        rehashed (corrected silently: another mapping version, or content that the call had before)
-- MARKS  `seen` has, by record key, <mapping version><flag><content hash>; flags, as in codes.py: e ingested · s seeded ·
--        u seeded unfinished · x erased
--
-- Races closed here:
-- * A poller that was taken for dead wakes up: its token is old, no row is ingested and no cursor moves.
-- * A source is removed while a poll or a backfill reads it: nothing is ingested behind the removal.
-- * Two pollers, or a poll and a backfill, bring the same row: `seen` and the call are written in the same step, so one
--   of them finds it new and the other known.
-- * A poll dies half way: the cursor moves with the last chunk only; the rows of the chunks before are known next time.
-- * A row changes while the relay is upgraded, or while processes of two versions poll: a row that another mapping writes
--   differently is corrected silently, but not where the provider's own words differ.
-- * Two rows have one key, or a row flaps: content that the call had before (the last 8) is corrected silently.

local sid, token, mapping, via = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local call_ttl = tonumber(ARGV[5])
if redis.call('HEXISTS', 'relay:removals', sid) == 1 or is_removed('source', sid) then return false end
if token ~= '' then
  local lease = lease_of('poll', sid, sid)
  if not lease or lease.token ~= token then return false end
end

local now = now_ms()
local stamp = string.format('%.0f', now)
local outcomes = {}
local i = 7

local function k_seen(day) return 'relay:seen:' .. sid .. ':' .. day end

local function recall(key, days, cid)
  for _, day in ipairs(days) do
    local mark = redis.call('HGET', k_seen(day), key)
    if mark then return mark, day end
  end
  local hash = redis.call('HMGET', 'relay:call:' .. cid, 'mapping', 'hash')
  if hash[1] and hash[2] then return hash[1] .. 'e' .. hash[2], nil end
end

local function remember(key, day, flag, hash, former_day)
  if former_day and former_day ~= day then redis.call('HDEL', k_seen(former_day), key) end
  redis.call('HSET', k_seen(day), key, mapping .. flag .. hash)
  redis.call('EXPIRE', k_seen(day), 42336000)
end

-- The holder of a lease may have just seen that there is nothing to fetch: 'LT' makes its lease dirty, so it looks again.
local function want_audio(cid)
  if redis.call('HEXISTS', 'relay:call:' .. cid, 'recording') == 1 then return end
  owe('record', sid, cid, now, lease_of('record', sid, cid) and 'LT' or 'NX')
end

-- `published` leaves out what equals the record, so with a new record it counts as published: no event says so.
local function correct(k_call, fields)
  if redis.call('EXISTS', k_call) == 0 then return end
  redis.call('HSET', k_call, unpack(fields))
  redis.call('HINCRBY', k_call, 'version', 1)
end

local function had_before(k_call, hash)
  local former = redis.call('HGET', k_call, 'former') or ''
  for at = 1, #former, #hash do
    if string.sub(former, at, at + #hash - 1) == hash then return true end
  end
  return false
end

local function add_former(k_call, hash)
  if had_before(k_call, hash) then return end
  local former = (redis.call('HGET', k_call, 'former') or '') .. hash
  redis.call('HSET', k_call, 'former', string.sub(former, -8 * #hash))
end

local function words_differ(k_call, words)
  local stored = redis.call('HGET', k_call, 'words')
  return stored and stored ~= words
end

local function finishes(k_call, finished)
  return finished == '1' and redis.call('HGET', k_call, 'finished') == '0'
end

for n = 1, tonumber(ARGV[6]) do
  local key, day, cid, hash, words = ARGV[i], ARGV[i + 1], ARGV[i + 4], ARGV[i + 5], ARGV[i + 6]
  local seed, restore, finished, audio = ARGV[i + 7] == '1', ARGV[i + 7] == 'r', ARGV[i + 8], ARGV[i + 9] == '1'
  local started, record, raw = ARGV[i + 10], ARGV[i + 11], ARGV[i + 12]
  local mark, marked_on = recall(key, { day, ARGV[i + 2], ARGV[i + 3] }, cid)
  local k_call = 'relay:call:' .. cid
  local fields = { 'mapping', mapping, 'hash', hash, 'words', words, 'finished', finished, 'started', started,
    'record', record, 'raw', raw }
  i = i + 13
  local outcome = 'known'
  local marked_mapping, flag, marked_hash = nil, nil, nil
  if mark then
    marked_mapping, flag, marked_hash = string.match(mark, '^(%d+)(%a)(.*)$')
  end

  local seeded = flag == 's' or flag == 'u'
  if (not mark and not seed) or (flag == 'u' and finished == '1' and marked_hash ~= hash)
    or (via == 'backfill' and seeded and finished == '1')
    or (restore and flag == 'e' and redis.call('EXISTS', k_call) == 0) then
    redis.call('HSET', k_call, 'version', 1, 'source', sid, 'key', key, 'first_seen', stamp, 'ready', stamp, 'via', via,
      unpack(fields))
    redis.call('EXPIRE', k_call, call_ttl)
    redis.call('ZADD', 'relay:calls', 'NX', now, cid)
    redis.call('ZADD', 'relay:calls:' .. sid, 'NX', now, cid)
    redis.call('HINCRBY', 'relay:counts', 'calls', 1)
    remember(key, day, 'e', hash, marked_on)
    owe('enrich', sid, cid, now, 'LT')
    if audio then want_audio(cid) end
    outcome = 'new'
  elseif not mark then
    remember(key, day, finished == '1' and 's' or 'u', hash, nil)
    outcome = 'seeded'
  elseif marked_hash == hash then
    if marked_mapping ~= mapping or marked_on ~= day then remember(key, day, flag, hash, marked_on) end
    if marked_mapping ~= mapping and redis.call('EXISTS', k_call) == 1 then
      redis.call('HSET', k_call, 'mapping', mapping)
    end
  elseif marked_mapping ~= mapping and not finishes(k_call, finished) and not words_differ(k_call, words) then
    remember(key, day, flag, hash, marked_on)
    correct(k_call, fields)
    outcome = 'rehashed'
  elseif had_before(k_call, hash) then
    remember(key, day, flag, hash, marked_on)
    add_former(k_call, marked_hash)
    correct(k_call, fields)
    if audio then want_audio(cid) end
    outcome = 'rehashed'
  else
    remember(key, day, flag, hash, marked_on)
    outcome = 'seeded'
    if flag == 'e' and redis.call('EXISTS', k_call) == 1 then
      if finishes(k_call, finished) then redis.call('HSET', k_call, 'ready', stamp) end
      if redis.call('HEXISTS', k_call, 'published') == 1 then
        -- `published` leaves out what equals the record; from now on that is the former record
        redis.call('HSETNX', k_call, 'published_record', redis.call('HGET', k_call, 'record'))
      end
      add_former(k_call, marked_hash)
      redis.call('HSET', k_call, unpack(fields))
      redis.call('HINCRBY', k_call, 'version', 1)
      redis.call('EXPIRE', k_call, call_ttl)
      owe('enrich', sid, cid, now, 'LT')
      if audio then want_audio(cid) end
      outcome = 'changed'
    end
  end
  outcomes[n] = outcome
end

if ARGV[i] == '1' then
  local fields = tonumber(ARGV[i + 1])
  for f = 0, fields - 1 do
    redis.call('HSET', 'relay:source:' .. sid, ARGV[i + 2 + 2 * f], ARGV[i + 3 + 2 * f])
  end
  i = i + 2 + 2 * fields
  for d = 1, tonumber(ARGV[i]) do
    redis.call('DEL', k_seen(ARGV[i + d]))
    redis.call('HDEL', 'relay:shown:' .. sid, ARGV[i + d], ARGV[i + d] .. '@')
  end
end
return outcomes
