-- Erase a call and events, with everything that hangs on them, in one step.
--
-- KEYS   none
-- ARGV   call id ('' for events whose call is gone already), version as it was read ('' for no call), subject,
--        source id ('' when unknown), n, then n event ids
-- REPLY  -1 when the call changed since it was read (nothing was done), else { events erased, deliveries ended }
--
-- Races closed here:
-- * an event is published, a contact or a recording arrives while a call is being erased: the version is another one,
--   and whoever erases reads again, so that no event is left behind.
-- * an attempt is in flight: when nothing else waits for its subject its lease ends here and its settle is refused;
--   otherwise its settle finds the event not pending and writes nothing. The delivery has ended as expired either way.
-- * audio is being fetched: the record lane's item is gone, the part that arrives is refused.

local cid, version, subject, sid = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local k_call = 'relay:call:' .. cid
if cid ~= '' and (redis.call('HGET', k_call, 'version') or '') ~= version then return -1 end

local now = now_ms()
local stamp = string.format('%.0f', now)
if cid ~= '' then
  redis.call('DEL', k_call)
  redis.call('ZREM', 'relay:calls', cid)
  redis.call('ZREM', 'relay:calls:' .. sid, cid)
  for _, lane in ipairs({ 'enrich', 'record' }) do
    forget(lane, sid, cid)
    rescore(lane, sid)
    redis.call('ZREM', k_quarantine(lane), sid .. '\31' .. cid)
  end
end

-- What an answer said may quote what was sent: attempts keep their outcome and lose their words.
local function without_words(state)
  if not string.find(state, '"a":', 1, true) then return state end
  local known, fields = pcall(cjson.decode, state)
  if not known then return state end
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
      local head = redis.call('ZRANGE', k_pending(sub, subject), 0, 0)[1]
      if redis.call('ZREM', k_pending(sub, subject), eid) == 1 then
        redis.call('HSET', k_event, sub, '{"s":"expired","t":' .. stamp .. '}')
        redis.call('ZADD', 'relay:dead', now, sub .. '\31' .. eid)
        ended = ended + 1
        if redis.call('EXISTS', k_pending(sub, subject)) == 0 then
          forget('deliver', sub, subject)
          rescore('deliver', sub)
        elseif head == eid then
          put('deliver', sub, subject, now, 'LT') -- the backoff was the erased one's
        end
      else
        redis.call('HSET', k_event, sub, without_words(state))
      end
    end
  end
end
return { erased, ended }
