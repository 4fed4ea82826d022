// Package pool owns who gets which Instance: claims, the warm sets of all nodes and their refill, Functions and their Revisions, and
// Runtimes. Manager is the AllocationService, the FunctionService and the RuntimeService.
//
// Decisions are values: which Instance (choose), whose turn (fairest), how many to make (refill), which to give up (shrink),
// whether one is drained. They are pure, and time is passed in. Manager keeps the facts under one mutex, and after every fact
// that changes takes all decisions anew (step); what they ask for (calls to nodes) is done outside of the mutex, and comes back
// as facts. Nothing polls: what waits is woken by the fact it waits for, or by its own deadline.
//
// Invariants:
//   - The node's compare-and-swap decides who has an Instance. What is in memory here is a hint: it can make a claim fail, never
//     succeed twice. Each attempt is a new claim with an id of its own; an outcome that is unknown is never assumed.
//   - Nothing of claims is on disk. After a restart the nodes' streams say what there is, and what is not Serving or Warm comes to
//     an end by itself: a claim has a deadline, on the node and here.
//   - Every term has a number (epoch) greater than those before. A node refuses a lower one than it has seen, and a Manager that
//     learns of a higher one stops.
//   - An Instance that is being drained is discarded only after every gateway that watches has acknowledged that, and has no
//     request in flight there, or after a bound.
//   - What is frozen is nobody's: it counts neither as ready nor towards a maximum, gateways do not know it, and only its own Revision
//     can claim it. Whatever is not certain about it ends in a discard, for it is worth a start and not a doubt.
//   - One kind of Instance that cannot be made (a Runtime that does not boot) stops no other.
//   - Values of secrets leave only towards nodes.
//   - Endpoints stand as long as nothing says that they are gone: a node that cannot be reached keeps its traffic for a while, and
//     gateways go on by themselves while there is no Manager at all.
package pool
