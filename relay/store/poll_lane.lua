-- The hooks of the poll lane (see exchange.lua): an item is a source, in a partition of its own.
--
-- ARGV   nothing of its own
-- FIELDS none
--
-- Race closed here: a source is removed while its poll waits, or by a process that this one does not know of yet: it is
-- polled no more.

function hooks.load(_, sid)
  if is_removed('source', sid) then return nil end
  return {}
end
