package pool

import (
	"cmp"
	"context"
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// instance is what is known of one Instance. Guarded by Manager.mu, as everything in this file.
type instance struct {
	id, node string
	// state is the node's newest word, by version; a node without versions is believed only to go forward.
	state    hearthv1.State
	version  int64
	degree   hearthv1.Degree
	kind     kind // of Runtime that is booted in it
	memory   int64
	address  string
	claim    *hearthv1.Claim
	function string
	revision string
	pod      string // that it is in; empty or its own id is one that was made for it
	group    group  // whose the pod is
	created  time.Time
	// session is the node's stream in which it was seen last; 0 is never.
	session int
	// making is true while our CreateInstance is under way, which began at begun.
	making bool
	begun  time.Time
	// freezing is true while our Freeze is under way.
	freezing bool
	// by is the allocation that an Activate is under way for, which began when session was claimedIn.
	by        *allocation
	claimedIn int
	// away: its node says nothing, so that gateways are not to use it.
	away bool
	// refused: the node did not give it to us although it looked free. limbo: the outcome of a claim on it is unknown. Either ends
	// with the node's next word, or at until.
	refused, limbo bool
	until          time.Time
	// shut is until when no worker is made in its pod.
	shut time.Time
	// serving and frozen are when it became so, as seen from here.
	serving, frozen time.Time
	drain           *drain
	discard         *discard
	gone            chan struct{} // closed when it is removed
	at              position      // in Manager.index
}

// kind is what a warm Instance is good for: a Runtime of one generation, or as the zero value a sandbox, which is good for all. What
// is in a shared pod is good for that group's Functions only.
type kind struct {
	runtime    string
	generation int64
	group      group
	pod        string
}

// in is a kind in a pod of its group.
func (k kind) in(pod string) kind { k.pod = pod; return k }

// ground is what is booted, wherever it is.
func (k kind) ground() kind { return kind{runtime: k.runtime, generation: k.generation} }

// podID names the pod that an Instance is in.
func (i *instance) podID() string { return cmp.Or(i.pod, i.id) }

// drain is the orderly end of an Instance's traffic.
type drain struct {
	version  int64 // of the first Endpoints event that says so; 0 is not sent yet
	began    time.Time
	deadline time.Time
	end      end
}

// end is what becomes of an Instance that has no requests any more.
type end int

const (
	// toDiscard ends it: somebody gave it up, or it is outdated.
	toDiscard end = iota
	// toFreeze keeps it frozen, if its Function may have another: it is not needed now.
	toFreeze
)

// discard is the decision that an Instance ends, carried out until the node agrees.
type discard struct {
	calling  bool
	done     bool // the node said so; the stream will too
	attempts int
	next     time.Time
}

// spare: nobody has it, and it may be claimed if its node is there.
func (i *instance) spare() bool {
	return i.state == hearthv1.State_STATE_WARM && i.by == nil && i.discard == nil && !i.limbo
}

// restless: something is under way with it, or it has an end.
func (i *instance) restless() bool {
	return i.by != nil || i.making || i.freezing || i.refused || i.limbo || i.drain != nil || i.discard != nil ||
		i.state <= hearthv1.State_STATE_CREATING || i.state == hearthv1.State_STATE_CLAIMED
}

// asleep: it is frozen, and may be claimed for its own Revision if its node is there.
func (i *instance) asleep() bool {
	return i.state == hearthv1.State_STATE_FROZEN && i.by == nil && i.drain == nil && i.discard == nil && !i.freezing && !i.limbo
}

// routable: gateways may send it requests.
func (i *instance) routable() bool {
	return i.state == hearthv1.State_STATE_SERVING && i.drain == nil && i.discard == nil && i.function != "" && !i.away
}

// leaving: it still exists but takes no new requests.
func (i *instance) leaving() bool {
	return i.drain != nil || i.discard != nil || i.state == hearthv1.State_STATE_DRAINING
}

// pending: it is claimed by somebody, and not by an allocation that is under way here.
func (i *instance) pending() bool {
	return (i.state == hearthv1.State_STATE_CLAIMED || i.limbo) && i.by == nil && !i.leaving()
}

// node is one nodeagent.
type node struct {
	name   string
	hash   uint64 // of name
	client Node
	info   NodeInfo
	zone   string         // a name for what fails together with it, or that of nothing
	sizes  map[string]int // that warm sets ask for, by Runtime
	images []string       // that they want there
	// calls that are under way; stop ends watch.
	calls   map[*context.CancelFunc]struct{}
	stop    context.CancelFunc
	removed bool
	// heard: its stream has told everything once, or failed. silent: the last attempt at one got no answer of any kind. away: and so
	// its Instances get no traffic.
	heard, silent, away bool
	// session counts streams; synced is whether the present one has told everything.
	session int
	synced  bool
	// since is when it was last lost; zero while it is synced.
	since    time.Time
	supplies map[string]*supply // by Runtime; "" is that of sandboxes
	// unsettled: what it has or wants may have changed since its stock was looked at; again is when that is to be done anyway.
	unsettled bool
	again     time.Time
	// began and ended are when the last activation did.
	began, ended time.Time
	prepares     map[string]*prepare // by Revision
}

// supply is how making Instances of one kind goes on a node: a Runtime that does not boot must not stop the others.
type supply struct {
	// creations that failed in a row, and until when none is begun.
	failures int
	retry    time.Time
	lastErr  string
}

func (n *node) supply(runtime string) *supply {
	s := n.supplies[runtime]
	if s == nil {
		s = &supply{}
		n.supplies[runtime] = s
	}
	return s
}

func (s *supply) failed(now time.Time, err error) {
	s.failures++
	s.lastErr = message(err)
	s.retry = now.Add(backoff(s.failures, 200*time.Millisecond, 5*time.Second))
}

// function is a deployed Function.
type function struct {
	name    string
	spec    *hearthv1.FunctionSpec
	public  *hearthv1.FunctionSpec // spec without the values of its secrets
	scaling bounds
	status  *hearthv1.FunctionStatus // generation, times; the rest is made when asked for
	serial  int64
	// revision names its Runtime only; what nodes are given has all of it: see Manager.complete.
	revision *hearthv1.Revision
	complete *hearthv1.Revision
	old      map[string]*hearthv1.Revision // whose prepared snapshots are still on nodes
	deleting bool
	desired  int
	reason   string
	// failures of starts in a row; from maxFailures on there is none before retry.
	failures int
	retry    time.Time
	lastErr  string
	// version of the last Endpoints event; Manager.changed has those that need another.
	version int64
	gone    chan struct{} // closed when a deletion is complete
}

// bounds are numbers of a Function's Instances, with defaults filled in.
type bounds struct{ min, max, frozen int }

// allocation is one call of Allocate, or one Instance that the scaler or the reserved minimum wants.
type allocation struct {
	id, function string
	came         time.Time // before the mutex was ours; zero for internal ones
	begun        time.Time
	deadline     time.Time
	internal     bool
	callers      int
	attempts     int
	next         time.Time // no attempt before
	lastErr      error
	claim        *hearthv1.Claim // of the last attempt
	chosen       time.Time
	inst         *instance
	thaws        bool // inst was frozen when it was chosen
	// done is closed when response or err is set, at ended.
	done     chan struct{}
	response *hearthv1.AllocateResponse
	err      error
	ended    time.Time
}

func (a *allocation) finished() bool { return !a.ended.IsZero() }

// subscriber is one gateway, by name.
type subscriber struct {
	streams  map[*stream]struct{}
	lost     time.Time // when its last stream ended
	version  int64
	inFlight map[string]int32
}
