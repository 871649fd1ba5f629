#!lua flags=allow-oom
-- Give back the leases that a process has in the store and does not work on.
--
-- KEYS   none
-- ARGV   process, lane, or '' for a process that ends: all of its leases, then the tokens that it works on
-- REPLY  how many were given back; their items are due now
--
-- Race closed here: the reply to a claim was lost on its way, or came after the runner had stopped waiting for it. The
-- process lives, so the leases would last as long as it does.

local process, only = ARGV[1], ARGV[2]
local working = {}
for n = 3, #ARGV do working[ARGV[n]] = true end
local count = 0
each_lease_of(process, function(lane, p, item, lease)
  if (only == '' or only == lane) and not working[lease.token] then
    give_back(lane, p, item)
    count = count + 1
  end
end)
if only == '' then
  redis.call('ZREM', 'relay:processes', process)
  redis.call('DEL', k_held(process))
end
return count
