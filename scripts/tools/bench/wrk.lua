-- Sends the requests in a file, separated by NUL bytes, in order and repeatedly. Counts the responses by status and prints
-- one line of JSON.
--   wrk [...] --script wrk.lua URL -- FILE

local requests = {}
local thread
sent = 0
statuses = {}

function setup(only_thread)
   thread = only_thread
end

function init(arguments)
   local file = assert(io.open(arguments[1], "rb"))
   for request in file:read("*a"):gmatch("%Z+") do
      requests[#requests + 1] = request
   end
   file:close()
end

function request()
   sent = sent + 1
   return requests[(sent - 1) % #requests + 1]
end

function response(status)
   local key = tostring(status)
   statuses[key] = (statuses[key] or 0) + 1
end

function done(summary, latency)
   local errors = summary.errors
   local counted = {}
   for status, count in pairs(thread:get("statuses")) do
      counted[#counted + 1] = string.format('"%s": %d', status, count)
   end
   print(string.format(
      '{"sent": %d, "answered": %d, "microseconds": %d, "p50": %d, "p99": %d, "failures": %d, "statuses": {%s}}',
      thread:get("sent"), summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
      errors.connect + errors.read + errors.write + errors.timeout, table.concat(counted, ", ")))
end
