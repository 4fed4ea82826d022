package instance

import (
	"context"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// instance is one Instance. Its id never changes; everything else is guarded by mu, which is never held over I/O.
type instance struct {
	id        string
	done      chan struct{} // closed when nothing is left of it
	ready     chan struct{} // closed when its sidecar has told so
	readyOnce sync.Once

	mu       sync.Mutex
	state    hearthv1.State
	created  time.Time
	sandbox  sandbox
	launcher launcher // from Warm on; nil after a restart that found the Function running
	sidecar  sidecar  // from Warm on; nil if it has none
	snapshot string   // key of the Function's root file system
	address  string
	claim    *hearthv1.Claim
	revision *hearthv1.Revision
	image    string // normalized reference, once claimed
	chainID  string // of its layers, once known
	start    *activation
	failure  error         // why it could not be created
	warm     chan struct{} // closed when creation has ended, well or not
	work     work          // creation or activation under way
	ending   bool          // somebody discards it already
	exited   chan struct{} // closed when the Function's process has ended
	status   uint32        // its exit status, then
}

// work is something under way that a discard has to end first. The zero value is nothing.
type work struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func newInstance(id string, state hearthv1.State, created time.Time) *instance {
	return &instance{
		id: id, state: state, created: created,
		done: make(chan struct{}), ready: make(chan struct{}), warm: make(chan struct{}), exited: make(chan struct{}),
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
	if i.sidecar != nil {
		_ = i.sidecar.Close() // likewise
		i.sidecar = nil
	}
}

// proto describes the Instance; mu must be held.
func (i *instance) proto(node string) *hearthv1.Instance {
	p := &hearthv1.Instance{
		Id: i.id, Node: node, State: i.state, Degree: hearthv1.Degree_DEGREE_SANDBOX,
		Address: i.address, CreatedAt: timestamppb.New(i.created),
		Function: i.revision.GetFunction(), Revision: i.revision.GetName(),
	}
	if i.claim != nil {
		p.Claim = proto.CloneOf(i.claim)
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

// advance moves an Instance to a later state and tells everyone; a move that is not forward changes nothing and is false.
// i.mu must be held, so that what is told is in the order of what happened.
func (e *Engine) advance(i *instance, to hearthv1.State) bool {
	if to <= i.state { // nothing here freezes, so that states only grow
		return false
	}
	e.metrics.moved(i.state, to)
	e.log.Info("instance moved", "instance", i.id, "from", i.state.String(), "to", to.String(),
		"function", i.revision.GetFunction(), "claim", i.claim.GetId())
	i.state = to
	e.hub.publish(i.proto(e.cfg.Node))
	return true
}

// labels of the container of an Instance that serves; mu must be held.
func (i *instance) labels(node string) map[string]string {
	return map[string]string{
		labelNode:     node,
		labelInstance: i.id,
		labelClaim:    i.claim.GetId(),
		labelEpoch:    strconv.FormatInt(i.claim.GetEpoch(), 10),
		labelFunction: i.revision.GetFunction(),
		labelRevision: i.revision.GetName(),
		labelImage:    i.image,
		labelChain:    i.chainID,
		labelPort:     strconv.Itoa(int(i.revision.GetPort())),
		labelCPU:      strconv.FormatInt(i.revision.GetResources().GetCpuMillis(), 10),
	}
}
