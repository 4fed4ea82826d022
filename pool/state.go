package pool

import (
	"time"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// instance is what is known of one Instance. Guarded by Manager.mu, as everything in this file.
type instance struct {
	id, node string
	// state is the node's last word, and only grows.
	state    hearthv1.State
	degree   hearthv1.Degree
	address  string
	claim    *hearthv1.Claim
	function string
	revision string
	created  time.Time
	// session is the node's stream in which it was seen last; 0 is never.
	session int
	// making is true while our CreateInstance is under way.
	making bool
	// by is the allocation that an Activate is under way for.
	by *allocation
	// refused: the node did not give it to us although it looked Warm. limbo: the outcome of a claim on it is unknown. Either ends
	// with the node's next word, or at until.
	refused, limbo bool
	until          time.Time
	// warm and serving are when it became so, as seen from here.
	warm, serving time.Time
	drain         *drain
	discard       *discard
	gone          chan struct{} // closed when it is removed
}

// drain is the orderly end of an Instance that serves.
type drain struct {
	version  int64 // of the first Endpoints event that says so; 0 is not sent yet
	began    time.Time
	deadline time.Time
}

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

// routable: gateways may send it requests.
func (i *instance) routable() bool {
	return i.state == hearthv1.State_STATE_SERVING && i.drain == nil && i.discard == nil && i.function != ""
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
	client Node
	// session counts streams; synced is whether the present one has told everything.
	session int
	synced  bool
	// since is when it was last lost; zero while it is synced.
	since time.Time
	// creations that failed in a row, and until when none is begun.
	failures int
	retry    time.Time
	lastErr  string
	// quiet is when the last activation began or ended.
	began, ended time.Time
	prepares     map[string]*prepare // by Revision
}

// function is a deployed Function.
type function struct {
	name     string
	spec     *hearthv1.FunctionSpec
	scaling  bounds
	status   *hearthv1.FunctionStatus // generation, times; the rest is made when asked for
	serial   int64
	revision *hearthv1.Revision
	old      map[string]*hearthv1.Revision // whose prepared snapshots are still on nodes
	deleting bool
	desired  int
	reason   string
	// failures of starts in a row; from maxFailures on there is none before retry.
	failures int
	retry    time.Time
	lastErr  string
	// version of the last Endpoints event; dirty asks for another.
	version int64
	dirty   bool
	gone    chan struct{} // closed when a deletion is complete
}

// bounds are a Function's min and max with defaults filled in.
type bounds struct{ min, max int }

// allocation is one call of Allocate, or one Instance that the scaler or the reserved minimum wants.
type allocation struct {
	id, function string
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
