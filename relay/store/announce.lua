#!lua flags=allow-oom
-- Announce that a configuration is in use, and learn which newer ones are.
--
-- KEYS   none
-- ARGV   version (a digest of the configuration), ms for which an announcement holds, ms after which an unused version
--        is forgotten, the version that this process had before or '', then perhaps the names that the configuration declares, as JSON: [["source", "main"], …]
-- REPLY  false when the version was not in use a moment ago: announce it again, with its names; else the versions in use
--        that are newer
--
-- The first process with a version gives it the next generation; the same version keeps it, so that a process that still
-- has the old file (or restarts with it) stays older, whatever the clocks of the processes say.
--
-- Races closed here:
-- * Two processes bring the same version: it gets one generation.
-- * What was removed from the configuration is declared again: its tombstone goes in the step that announces it.
-- * A process takes up an older configuration again: the one that it had ends with that, unless others have it, which
--   announce it again within a second.
-- * The store's memory is full: processes must not take each other for gone (allow-oom).

local version, holds_ms, forgotten_ms, names = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[5]
local now = now_ms()
local k_version = k_configuration(version)

for _, unused in ipairs(redis.call('ZRANGEBYSCORE', K_CONFIGURATIONS, '-inf', now - forgotten_ms)) do
  redis.call('ZREM', K_CONFIGURATIONS, unused)
  redis.call('DEL', k_configuration(unused))
end

if ARGV[4] ~= '' then redis.call('ZADD', K_CONFIGURATIONS, 'XX', now - holds_ms - 1, ARGV[4]) end
local announced = tonumber(redis.call('ZSCORE', K_CONFIGURATIONS, version) or 0)
if not names and announced < now - holds_ms then return false end
if names then
  if redis.call('EXISTS', k_version) == 0 then
    redis.call('HSET', k_version, 'generation', redis.call('INCR', 'relay:configuration-generation'))
  end
  redis.call('HSET', k_version, 'names', names)
  for _, name in ipairs(cjson.decode(names)) do
    redis.call('SADD', k_configured(name[1]), name[2])
    redis.call('HDEL', k_removed(name[1]), name[2])
    redis.call('HSET', k_owners(name[1]), name[2], OPERATOR)
  end
end
redis.call('ZADD', K_CONFIGURATIONS, now, version)

local generation = tonumber(redis.call('HGET', k_version, 'generation') or 0)
local newer = {}
for _, other in ipairs(redis.call('ZRANGEBYSCORE', K_CONFIGURATIONS, now - holds_ms, '+inf')) do
  if tonumber(redis.call('HGET', k_configuration(other), 'generation') or 0) > generation then
    newer[#newer + 1] = other
  end
end
return newer
