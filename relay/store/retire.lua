-- Leave a tombstone of every source and subscription that no configuration in use declares any more.
--
-- KEYS   none
-- ARGV   ms for which an announcement of a configuration counts
-- REPLY  what was removed: kind, id, kind, id, …
--
-- Races closed here:
-- * A process announces a configuration that declares it again: its announcement takes the tombstone back.
-- * A process with a newer or an older configuration is being restarted: what its announcement declared counts on for a
--   while, so that no rolling restart removes anything.

local now = now_ms()
local declared = { source = {}, subscription = {} }
for _, version in ipairs(redis.call('ZRANGEBYSCORE', K_CONFIGURATIONS, now - tonumber(ARGV[1]), '+inf')) do
  for _, name in ipairs(cjson.decode(redis.call('HGET', k_configuration(version), 'names') or '[]')) do
    if declared[name[1]] then declared[name[1]][name[2]] = true end
  end
end

local removed = {}
for _, kind in ipairs({ 'source', 'subscription' }) do
  for _, id in ipairs(redis.call('SMEMBERS', k_configured(kind))) do
    if not declared[kind][id] then
      redis.call('SREM', k_configured(kind), id)
      if redis.call('HEXISTS', 'relay:declared:' .. kind, id) == 0 then
        redis.call('HSET', k_removed(kind), id, string.format('%.0f', now))
        removed[#removed + 1] = kind
        removed[#removed + 1] = id
      end
    end
  end
end
return removed
