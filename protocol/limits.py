"""Every bound of the protocol, each with its reason.

Sizes are in bytes and times in seconds unless a name says otherwise.
"""

from __future__ import annotations

#: Protocol versions that this code speaks. Two ends agree on the highest that both know.
VERSION_MIN = 1
VERSION_MAX = 1

#: Sixteen times the largest fleet that we know of, and a bitmap of it is still only 8 KiB.
MAX_RANK = 65_535
#: A packed set of ranks in bytes.
MAX_BITMAP = (MAX_RANK + 1) // 8

#: A message is a header, a body and at most one blob.
MAX_PARTS = 3
#: libzmq bounds each frame, not the message (zmq_setsockopt, ZMQ_MAXMSGSIZE); with MAX_PARTS it bounds the message too.
#: The largest legitimate frame is a body of MAX_BODY; a header with a full bitmap is 8 KiB.
MAX_FRAME = 4 << 20
MAX_HEADER = 16 << 10
#: A push manifest of 32,768 chunk digests is 1 MiB; a plan of 10,000 descendants is about 1 MiB. MessagePack of empty
#: maps can expand 73-fold when decoded into untyped objects, so bodies are decoded into types only.
MAX_BODY = 4 << 20

#: A command's whole signed payload.
MAX_PAYLOAD = 3 << 20
#: How much text a command line may have: Linux takes at most 128 KiB in one argument (execve(2), MAX_ARG_STRLEN).
MAX_COMMAND_TEXT = 128 << 10
#: What each host may send of a streamed output before it is granted more: most commands write less, and need no grant.
STREAM_FIRST = 16 << 10
#: What all hosts of one command may have on their way beyond that: it bounds what the service and every relay hold of
#: it, and what an outcome may find before it on a link. 4 MiB keep a 10 Gbit/s link of 3 ms busy.
STREAM_WINDOW = 4 << 20
#: And what all commands together may have, beyond a STREAM_FIRST of each that goes on: a hundred clients that do not
#: read leave the service, and a relay that all of it comes through, small.
STREAM_TOTAL = 32 << 20
#: One host's part of it: as much as a link of 80 Mbit/s and 100 ms takes.
STREAM_MOST = 1 << 20
#: Output leaves its host in pieces of this size, or when the oldest byte has waited for this long (s): no message a
#: line, and nothing that a person would notice. A message and its grant wake three processes, which costs them as much
#: as 300 KiB: with pieces of 64 KiB, and grants of as little, a flood of 64 hosts took five times the CPU time.
STREAM_PIECE = 256 << 10
STREAM_DELAY = 0.02
#: What writes nothing for so long (s) gives back what it may send, but for this: some lines need no grant first.
STREAM_IDLE = 1.0
STREAM_LEAST = 1 << 10
#: A command's input travels in pieces of this size, of which a host has at most so many bytes that it did not take
#: yet: it shares links with commands, and must not hold them up.
INPUT_PIECE = 64 << 10
INPUT_CREDIT = 256 << 10
#: And so much the service keeps of an input in memory, and for the clients to send ahead: hosts that are about as fast
#: as one another are no further apart.
INPUT_WINDOW = 8 << 20
#: And what it keeps so of all commands' inputs together, beyond an INPUT_CREDIT of each.
INPUT_TOTAL = 64 << 20
#: So far may the host that takes most be ahead of the one that takes least: the service keeps that on its disk. Larger
#: than what most people send, so that a host that never reads holds up nobody.
INPUT_APART = 1 << 30
#: Environment variables that a command may set, and resource limits: more than anybody types.
MAX_ENV = 256
#: A script, or an input, that rides in the signed command: larger ones are pushed, or sent piece by piece.
MAX_SCRIPT = 256 << 10
#: What one host's standard output or error may add to its outcome; the rest stays in the host's spool.
MAX_OUTPUT = 1 << 20
DEFAULT_OUTPUT = 256 << 10
#: A reason or other sentence made for people.
MAX_TEXT = 2_000
#: VMs in one report of a host: hundreds are many, and so many still fit in one message.
MAX_VMS = 4_096
#: A file's path: Linux's PATH_MAX.
MAX_PATH = 4_096

#: What passes through a chain comes to its end later by the time of one chunk at each host: 9.8 ms at 80 Mbit/s.
#: Smaller ones cost more in calls than they save: 64 MB to 32 hosts at 80 Mbit/s, all on two cores, took 7.43 s in
#: chunks of 96 KiB (median of 15, 7.31 to 7.82) and 7.64 of 64 KiB (of 12, 7.43 to 8.04); to 8 hosts the same but for
#: hundredths. What has so many of the large ones that this matters little has those: they cost hosts less.
CHUNK = 96 << 10
CHUNK_LARGE = 256 << 10
CHUNKS_LEAST = 1_024
MAX_CHUNK = 2 << 20
#: Digests in one manifest: 32,768 x 32 bytes is 1 MiB. With chunks of MAX_CHUNK that is a file of 64 GiB.
MAX_CHUNKS = 32_768
#: What is taken from a conduit at a time, in bytes: where the processor is the limit much has come by the time that its
#: turn comes, and a wake-up costs as much as several chunks do. This much takes a millisecond or two.
CONDUIT_TAKEN = 1 << 20
#: A ticket to a conduit, and the largest body there, in bytes: ASK_WINDOW indices, or a sentence.
CONDUIT_TICKET = 32
CONDUIT_BODY = 16 << 10
#: A host asks for a conduit where a push has so many bytes: a connection costs as much as these take on the bulk link.
CONDUIT_LEAST = 2 << 20
#: What a host may have asked one source for and not received, in bytes: most has not come to the source yet, and a
#: question that waits for a fifth of a second behind chunks at 80 Mbit/s holds nothing up. And in chunks, at most.
BULK_WINDOW = 2 << 20
ASK_WINDOW = 32
#: A source that is this far behind another, in bytes, is held against that one in a trial.
AHEAD = 1 << 20
#: A source that can't answer yet says that it is alive this often; whoever hears nothing for so long asks another. Four
#: words may get lost in a machine that is busy, and two seconds are felt by nobody.
HOLD_EVERY = 0.5
BULK_SILENT = 2.0
#: Who left whom, in one message, and why, in characters: half a MiB at most.
MAX_LEFT = 1_024
MAX_REASON = 120
#: A source that does not know a push yet is asked again after this: its command travels by the other socket.
ASK_AGAIN = 0.1
#: Chunks that may wait for the disk, in bytes, before a host stops asking for more: bounds memory where a disk is slow.
#: Pushes of one time share it.
UNSTORED_MOST = 4 << 20
#: Files up to this size ride in the command itself, down the control tree: one message is cheaper than an ask and an
#: answer per host. A relay sends it to each child, but what is no more than a chunk passes through a chain no faster:
#: host by host. Measured with links of 80 Mbit/s, the service's too, 16 hosts, in ms, by the tree and by the chain, in
#: chunks of 64 KiB then:
#: 64 KiB 121 and 340, 96 KiB 185 and 257, 128 KiB 235 and 220, 256 KiB 497 and 254. More children bring that nearer.
MAX_INLINE = 64 << 10
#: Names in one push or pull. On a host each takes what it has in the packed listing, up to 8 MiB in all of the 32 MiB
#: that a push may take, and some 25 bytes beside.
MAX_ENTRIES = 50_000
#: Paths that one pull may name: each has a name of its own in the folder that they go to.
MAX_OFFERED = 1_000
#: Its packed listing: 50,000 entries of 80 bytes are half of it.
MAX_LISTING = 8 << 20
#: Parts of its sparse files, together: a badly fragmented image of 64 GiB has some tens of thousands.
MAX_EXTENTS = 100_000
#: What a host keeps of chunks in memory for those behind it, of all pushes together.
CHUNK_CACHE = 8 << 20
#: And so many: a compressed one may have 20 bytes, and takes near 1 KiB for itself. That is 2 MiB.
CACHED_MOST = 2048

#: What of a VM's console is on its way and not yet seen: a screen of 200 x 60 with all its colours, and 16 KiB/s on a
#: line of 2 s.
CONSOLE_WINDOW = 32 << 10
#: What is typed, in one piece: a pasted screen, and no more than a relay passes on in a moment.
MAX_FEED = 4 << 10
#: VMs that a host makes at a time, at most: four were best on two cores, and hosts have a hundred.
MAX_IN_FLIGHT = 256
#: Who has a console open says so at least this often; a console of whom nothing was heard for the second is closed.
CONSOLE_EVERY = 5.0
CONSOLE_SILENT = 30.0

#: A heartbeat in each direction; any message counts as one.
BEAT_EVERY = 2.0
#: Three heartbeats and some slack: silence is known within 10 s at the root, as promised, with room for a loaded host.
SILENT_AFTER = 7.0
#: A process that was not run for this long doubts itself before it doubts its peers.
PAUSED_AFTER = 3.0
#: How long a new parent may take to answer before the next ancestor is tried.
ATTACH_WITHIN = 3.0
#: An orphan waits up to this long, drawn at random, before it attaches: a lost relay of 32 must not make a herd.
ATTACH_JITTER = 0.2
#: A planned parent that refuses may not have begun yet, or not know this plan yet: so often it is asked again, within
#: 2 s in all, before the next ancestor gets a child that it was not planned to have.
PARENT_TRIES = 3
#: After all ancestors have been tried, wait this long before the first again, doubled up to the second number.
RETRY_FIRST = 0.2
RETRY_MOST = 5.0
#: An unreachable host's commands are settled as lost when it has not come back for this long. Orphans are back in 3 s.
LOST_AFTER = 5.0
#: The same for hosts further below a host that was lost. A relay between may have died in silence just before, which
#: its children know only SILENT_AFTER its last heartbeat; then they try one more ancestor that does not answer.
ORPHANED_AFTER = SILENT_AFTER + BEAT_EVERY + ATTACH_WITHIN + ATTACH_JITTER + 1.0
#: The same after the service itself was away: agents try again every RETRY_MOST seconds by then, and half as much more.
RETURN_WITHIN = 15.0
#: A relay that has found no way up for so long lets a child look for one: longer than orphans need, and than a service
#: takes to begin anew.
STRANDED_AFTER = 15.0
#: So long that child may be away before it is taken to have found one: five ancestors, ATTACH_WITHIN and a pause each.
PROBED_WITHIN = 20.0
#: What an agent ends gets a polite signal, and after this the certain one.
KILL_AFTER = 2.0
#: A command may be given more: so long, and a host's outcome is waited for by as much.
MAX_KILL_AFTER = 600.0
#: A host's outcome may come this long after the deadline before the root says that it did not: the signals' time, and
#: as much again to travel.
DEADLINE_SLACK = 2 * KILL_AFTER
#: How long a relay keeps outcomes in hope of folding more into them: shorter than a person notices.
FOLD_WINDOW = 0.02
#: A relay sends what it has folded when it has this much, so that no message grows without bound.
FOLD_BYTES = 256 << 10
#: And as many as there can be in that, at 64 bytes each.
MAX_FOLDS = 4_096
#: Outcomes that a relay sends up before its parent has passed them on, in bytes: what a link of 80 Mbit/s and 50 ms
#: takes. A parent of 32 holds 24 MiB where all send outputs of the usual budget at once, and its own link is slow.
OUTCOME_CREDIT = 512 << 10
#: And before the news that hosts are gone, theirs, beyond that: what a child that is lost had sent by its own credit,
#: two times over. Whoever sends more than this in all holds more of its parent's memory than it may.
OUTCOME_LAST = 2 << 20
#: What a relay without a way up keeps of outcomes, so that those of hosts that die meanwhile are not lost. Above it,
#: the agents are asked again once there is a way.
FOLD_KEEP = 16 << 20
#: An outcome that is not acknowledged after this goes to the agent's disk: the word that a command is settled takes
#: SETTLED_EVERY and a way down, so that what goes well never touches the disk.
KEEP_AFTER = 3.0
#: What an agent keeps in memory of outcomes that are on its disk, or can't be: four of the largest with both streams.
KEEP_MEMORY = 8 << 20
#: What it keeps of them on disk: thirty-two of the largest, and a sixteenth of what output spools may take there.
KEEP_DISK = 64 << 20
#: An outcome that nobody acknowledged for so long belongs to a command that the root has forgotten: a week is longer
#: than a service is away that comes back at all.
KEEP_FOR = 7 * 86_400.0
#: Commands of which the root remembers who was lost, to ask them once more when they come back, and the bytes that
#: these may have: a thousand are more than are given while a host is away for minutes.
LATE_COMMANDS = 1_000
LATE_BYTES = 16 << 20
#: Reports may wait longer than outcomes; nobody waits for them.
REPORT_WINDOW = 0.2
#: The root tells agents which commands are settled at most this often, in one message for all of them.
SETTLED_EVERY = 1.0
#: A command is refused this long after it was issued where it says nothing else. The agent's notion of the root's
#: time is off by one message's travel time at most.
DEFAULT_LIFETIME_MS = 600_000
#: An agent that does not know the root's time asks again after this long, doubled up to the second number: a question
#: or its answer goes down with any relay on the way.
CLOCK_RETRY = 2.0
CLOCK_RETRY_MOST = 30.0
#: And one that knows asks again this often: cheap quartz drifts by up to 60 ms in it.
CLOCK_EVERY = 600.0
#: Commands that wait at an agent for its first word on the root's time.
MAX_WAITING_FOR_CLOCK = 64
#: A child may have a plan of yesterday, and speak in good faith for hosts that are planned elsewhere today. So long
#: after it attached, or after its parent's plan changed, that is not heard, and not held against it: it has its own
#: new plan by then.
PLAN_GRACE = 30.0
#: A peer that broke the rules is not let in again for this long.
PENALTY = 10.0
#: What a VM is moved in travels in pieces of at most this size: what CURVE does best at, in bytes.
CARRY_MOST = 256 << 10
#: What each end of a channel may have on its way and not written yet: it keeps a link of 10 Gbit/s and 3 ms busy.
CARRY_WINDOW = 4 << 20
#: Channels of one move over its whole life: libvirt opens one of each kind, and one more of memory for each thread.
MOVE_CHANNELS = 64
#: A VM's seed disk as it moves: a NoCloud disk is some 400 KiB, and its documents are bounded by MAX_PAYLOAD.
SEED_MOST = 8 << 20
#: How long a host that is ready to take a VM in waits for the one that has it, in seconds.
MOVE_WITHIN = 60.0
