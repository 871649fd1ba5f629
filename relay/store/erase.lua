-- Erase a call and events, with everything that depends on them, in one step.
--
-- KEYS   none
-- ARGV   call id ('' for events whose call is gone already), version as it was read ('' for no call), ordering key,
--        source id ('' when unknown), n, then n event ids, m, then m days in which `seen` may have the call
-- REPLY  -1 when the call changed since it was read (nothing was done), else { events erased, deliveries ended }
--
-- Races closed here:
-- * An event is published, a contact or a recording arrives while a call is being erased: the version is another one,
--   and the caller reads again, so that no event is left behind.
-- * An attempt is in flight: when nothing else is pending for its ordering key its lease ends here and its settlement is
--   refused; otherwise its settlement finds the event not pending and writes nothing. The delivery has expired either way.
-- * Audio is being fetched, or the contact looked up: the lane's item is gone, the part that arrives is refused.
-- * The call is compared with the provider's list later: `seen` says that it was erased, so that it is not taken for lost.

local cid, version, ordering_key, sid = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local k_call = 'relay:call:' .. cid
if cid ~= '' and (redis.call('HGET', k_call, 'version') or '') ~= version then return -1 end

local now = now_ms()
local stamp = string.format('%.0f', now)
if cid ~= '' then
  local key = redis.call('HGET', k_call, 'key')
  for n = 7 + tonumber(ARGV[5]), #ARGV do
    local k_seen = 'relay:seen:' .. sid .. ':' .. ARGV[n]
    local mark = key and redis.call('HGET', k_seen, key)
    if mark then redis.call('HSET', k_seen, key, (string.gsub(mark, '^(%d+)%a', '%1x'))) end
  end
  redis.call('DEL', k_call)
  redis.call('ZREM', 'relay:calls', cid)
  redis.call('ZREM', 'relay:calls:' .. sid, cid)
  for _, lane in ipairs({ 'enrich', 'contacts', 'record' }) do
    forget(lane, sid, cid)
    rescore(lane, sid)
    settle_owed(lane, sid, cid)
    redis.call('ZREM', k_quarantine(lane), sid .. '\31' .. cid)
  end
end

-- A response may quote what was sent: attempts are dropped, their outcome stays.
local function without_attempts(state)
  if not string.find(state, '"a":', 1, true) then return state end
  local valid, fields = pcall(cjson.decode, state)
  if not valid then return state end
  fields.a = nil
  return cjson.encode(fields)
end

local erased, ended = 0, 0
for n = 1, tonumber(ARGV[5]) do
  local eid = ARGV[5 + n]
  local k_event = 'relay:event:' .. eid
  erased = erased + redis.call('HDEL', k_event, '=')
  redis.call('ZREM', 'relay:events', eid)
  if sid ~= '' then redis.call('ZREM', 'relay:events:' .. sid, eid) end
  local states = redis.call('HGETALL', k_event)
  for i = 1, #states, 2 do
    local sub, state = states[i], states[i + 1]
    if sub ~= '#' then
      local head = redis.call('ZRANGE', k_pending(sub, ordering_key), 0, 0)[1]
      if redis.call('ZREM', k_pending(sub, ordering_key), eid) == 1 then
        redis.call('HSET', k_event, sub, '{"s":"expired","t":' .. stamp .. '}')
        redis.call('ZADD', 'relay:dead', now, sub .. '\31' .. eid)
        ended = ended + 1
        if redis.call('EXISTS', k_pending(sub, ordering_key)) == 0 then
          forget('deliver', sub, ordering_key)
          rescore('deliver', sub)
          settle_owed('deliver', sub, ordering_key)
        elseif head == eid then
          put('deliver', sub, ordering_key, now, 'LT') -- the backoff was the erased event's
        end
      else
        redis.call('HSET', k_event, sub, without_attempts(state))
      end
    end
  end
end
return { erased, ended }
