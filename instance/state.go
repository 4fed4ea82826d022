package instance

import (
	"context"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// instance is one Instance. Its id and place never change; everything else is guarded by mu, which is never held over I/O.
type instance struct {
	id        string
	pod       *pod
	slot      int           // in the pod
	done      chan struct{} // closed when nothing is left of it
	ready     chan struct{} // closed when its sidecar has told so
	readyOnce sync.Once

	mu       sync.Mutex
	trial    bool // the node's own: nobody is told of it
	state    hearthv1.State
	version  int64 // of what was told last
	created  time.Time
	sandbox  sandbox
	launcher launcher // from Warm on; nil after a restart that found the Function running
	pid      uint32   // of the Function's process; 0 before there is one
	sidecar  sidecar  // from Warm on; nil if it has none
	snapshot string   // key of the Function's root file system
	address  string
	claim    *hearthv1.Claim // nil before it is claimed, and while it is frozen
	revision *hearthv1.Revision
	image    string            // normalized reference, once claimed
	chainID  string            // of its layers, once known
	booted   *booted           // the Runtime in it; nil in a sandbox
	boots    *hearthv1.Runtime // what is to be booted in it, while it is made
	code     *codeView         // of the Function's package
	start    *activation       // of the claim
	failure  error             // why it could not be created
	warm     chan struct{}     // closed when creation has ended, well or not
	work     work              // creation, activation or freezing under way
	ending   bool              // somebody discards it already
	exited   chan struct{}     // closed when the Function's process has ended
	status   uint32            // its exit status, then
	recorded chan struct{}     // closed when containerd knows what the claim has made of it
	freeze   *freezing         // under way
	frozen   frozen            // what was noted when it was frozen last
}

// work is something under way that a discard has to end first. The zero value is nothing.
type work struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func newInstance(id string, in *pod) *instance {
	return &instance{
		id: id, pod: in, created: time.Now(),
		done: make(chan struct{}), ready: make(chan struct{}), warm: make(chan struct{}), exited: make(chan struct{}),
		recorded: make(chan struct{}),
	}
}

// containerID is the id of an Instance's one container, the launcher's and then the Function's.
func containerID(instance string) string { return instance + ".fn" }

// letGo ends the connections to the launcher, which waits on if it still does, and to the sidecar.
func (i *instance) letGo() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.launcher != nil {
		_ = i.launcher.Close() // there is nobody to tell
		i.launcher = nil
	}
	if i.booted != nil {
		i.booted.close()
	}
	if i.sidecar != nil {
		_ = i.sidecar.Close() // likewise
		i.sidecar = nil
	}
}

// proto describes the Instance; mu must be held.
func (i *instance) proto(node string) *hearthv1.Instance {
	o := i.pod.whose()
	p := &hearthv1.Instance{
		Id: i.id, Pod: i.pod.id, Tenant: o.tenant, Group: o.group, Node: node, State: i.state, Degree: hearthv1.Degree_DEGREE_SANDBOX,
		Address: i.address, CreatedAt: timestamppb.New(i.created),
		Function: i.revision.GetFunction(), Revision: i.revision.GetName(), Version: i.version,
	}
	if i.claim != nil {
		p.Claim = proto.CloneOf(i.claim)
	}
	switch {
	case i.booted != nil:
		p.Degree, p.Runtime, p.RuntimeGeneration = hearthv1.Degree_DEGREE_RUNTIME, i.booted.name, i.booted.generation
		p.Language = i.booted.language()
	case i.boots != nil: // whoever counts what is being made counts it as that
		p.Degree, p.Runtime, p.RuntimeGeneration = hearthv1.Degree_DEGREE_RUNTIME, i.boots.Name, i.boots.Generation
	}
	if i.state == hearthv1.State_STATE_FROZEN {
		p.Degree, p.MemoryBytes = hearthv1.Degree_DEGREE_REVISION, i.frozen.bytes
	}
	if p.Address == "" && i.sandbox.IP.IsValid() {
		p.Address = i.sandbox.IP.String()
	}
	return p
}

// endpoint is where the Function listens; mu must be held and the Instance claimed.
func (i *instance) endpoint() netip.AddrPort {
	return netip.AddrPortFrom(i.sandbox.IP, uint16(i.revision.GetPort()))
}

// moves are the states that may follow one. An Instance is never Warm again. What a former engine left may begin anywhere.
var moves = map[hearthv1.State][]hearthv1.State{
	hearthv1.State_STATE_UNSPECIFIED: {
		hearthv1.State_STATE_CREATING, hearthv1.State_STATE_WARM, hearthv1.State_STATE_SERVING, hearthv1.State_STATE_FROZEN,
		hearthv1.State_STATE_DRAINING, hearthv1.State_STATE_GONE,
	},
	hearthv1.State_STATE_CREATING: {hearthv1.State_STATE_WARM, hearthv1.State_STATE_DRAINING, hearthv1.State_STATE_GONE},
	hearthv1.State_STATE_WARM:     {hearthv1.State_STATE_CLAIMED, hearthv1.State_STATE_DRAINING, hearthv1.State_STATE_GONE},
	hearthv1.State_STATE_CLAIMED:  {hearthv1.State_STATE_SERVING, hearthv1.State_STATE_DRAINING, hearthv1.State_STATE_GONE},
	hearthv1.State_STATE_SERVING:  {hearthv1.State_STATE_FROZEN, hearthv1.State_STATE_DRAINING, hearthv1.State_STATE_GONE},
	hearthv1.State_STATE_FROZEN:   {hearthv1.State_STATE_CLAIMED, hearthv1.State_STATE_DRAINING, hearthv1.State_STATE_GONE},
	hearthv1.State_STATE_DRAINING: {hearthv1.State_STATE_GONE},
}

// advance moves an Instance to another state and tells everyone; a move that may not be made changes nothing and is false.
// i.mu must be held, so that what is told is in the order of what happened.
func (e *Engine) advance(i *instance, to hearthv1.State) bool {
	if !slices.Contains(moves[i.state], to) {
		return false
	}
	e.metrics.moved(i.state, to)
	e.log.Info("instance moved", "instance", i.id, "from", i.state.String(), "to", to.String(),
		"function", i.revision.GetFunction(), "claim", i.claim.GetId())
	i.state, i.version = to, e.versions.next()
	if !i.trial {
		e.hub.publish(i.proto(e.cfg.Node))
	}
	return true
}

// versions numbers changes. They grow over restarts too: a number is the wall clock's nanoseconds, or one more than the last where
// that is larger. Labels keep the numbers of what is recorded, for a clock that was set back in between.
type versions struct{ last atomic.Int64 }

// versionsAhead is how many changes may go unrecorded before a restart with a clock that was set back.
const versionsAhead = 1 << 30

func (v *versions) next() int64 {
	for {
		last := v.last.Load()
		next := max(last+1, time.Now().UnixNano())
		if v.last.CompareAndSwap(last, next) {
			return next
		}
	}
}

// seen says that a former engine has used a number.
func (v *versions) seen(n int64) {
	if n <= 0 || n > math.MaxInt64-versionsAhead {
		return // no number of ours
	}
	for last := v.last.Load(); last < n+versionsAhead; last = v.last.Load() {
		if v.last.CompareAndSwap(last, n+versionsAhead) {
			return
		}
	}
}

// labels of the container of an Instance that serves, or in which a Runtime waits; mu must be held.
func (e *Engine) labels(i *instance) map[string]string {
	list := e.placeLabels(i, map[string]string{labelNode: e.cfg.Node, labelInstance: i.id, labelImage: i.image, labelChain: i.chainID,
		labelVersion: strconv.FormatInt(i.version, 10)})
	if i.booted != nil {
		i.booted.labels(list)
	}
	if i.claim != nil {
		list[labelClaim] = i.claim.GetId()
		list[labelEpoch] = strconv.FormatInt(i.claim.GetEpoch(), 10)
		list[labelFunction] = i.revision.GetFunction()
		list[labelRevision] = i.revision.GetName()
		list[labelPort] = strconv.Itoa(int(i.revision.GetPort()))
		list[labelCPU] = strconv.FormatInt(i.revision.GetResources().GetCpuMillis(), 10)
	}
	if i.code != nil {
		list[labelCode], list[labelCodeChain] = i.code.key, i.code.chainID
	}
	return list
}
