-- Delete calls, or events, whose retention is over, some at a time.
--
-- KEYS   none
-- ARGV   list (relay:calls or relay:events), prefix of the keys that it names, newest moment that may be over, ms,
--        remaining TTL of a key whose retention is over, ms, entries to skip, most entries in this step
-- REPLY  { deleted, kept }: kept ones were renewed meanwhile, skip them in the next step
--
-- The TTL is no more than a reminder of the last change: it is longer than the retention by far, so that no leap of the
-- server's clock deletes anything.
--
-- Race closed here: a call changes, or a delivery of an old event is settled, while the list is trimmed: its TTL was
-- renewed in that step, so it is kept.

local list, prefix, newest, left = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local deleted, kept = 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', list, '-inf', newest, 'LIMIT', ARGV[5], ARGV[6])) do
  if redis.call('PTTL', prefix .. id) > left then
    kept = kept + 1
  else
    redis.call('DEL', prefix .. id)
    redis.call('ZREM', list, id)
    deleted = deleted + 1
  end
end
return { deleted, kept }
