package instance

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// newsDelay keeps word of a start off the cores until its answer is on its way, which says the same to who waits for it.
const newsDelay = 3 * time.Millisecond

// subscriberBuffer is how many changes a subscriber may be behind before its stream is ended.
const subscriberBuffer = 1024

// hub holds what was last told of each Instance and passes changes on. It never blocks on a subscriber.
type hub struct {
	mu          sync.Mutex // guards what follows; taken after an instance's mu
	last        map[string]*hearthv1.Instance
	subscribers map[*subscriber]struct{}
	epoch       int64
	closed      bool
}

// subscriber gets each change. The channel is closed when it is too slow or the engine stops.
type subscriber struct {
	changes chan change
	slow    bool // guarded by the hub's mu until changes is closed
}

type change struct {
	instance *hearthv1.Instance // shared: nobody may change it
	epoch    int64
}

func newHub() *hub {
	return &hub{last: map[string]*hearthv1.Instance{}, subscribers: map[*subscriber]struct{}{}}
}

// publish passes on what an Instance is now. The hub owns p from here on.
func (h *hub) publish(p *hearthv1.Instance) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.State == hearthv1.State_STATE_GONE {
		delete(h.last, p.Id)
	} else {
		h.last[p.Id] = p
	}
	for s := range h.subscribers {
		select {
		case s.changes <- change{p, h.epoch}:
		default:
			s.slow = true
			h.drop(s)
		}
	}
}

// drop ends a subscription; mu must be held.
func (h *hub) drop(s *subscriber) {
	if _, ok := h.subscribers[s]; ok {
		delete(h.subscribers, s)
		close(s.changes)
	}
}

func (h *hub) setEpoch(epoch int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.epoch = epoch
}

func (h *hub) currentEpoch() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.epoch
}

// subscribe returns all Instances as they are and a subscription to every change after that.
func (h *hub) subscribe() ([]*hearthv1.Instance, *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &subscriber{changes: make(chan change, subscriberBuffer)}
	if h.closed {
		close(s.changes)
		return nil, s
	}
	h.subscribers[s] = struct{}{}
	var all []*hearthv1.Instance
	for _, p := range h.last {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *hearthv1.Instance) int { return cmp.Compare(a.Id, b.Id) })
	return all, s
}

func (h *hub) unsubscribe(s *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop(s)
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for s := range h.subscribers {
		h.drop(s)
	}
}

// WatchInstances implements NodeService. A subscriber that falls more than 1,024 changes behind gets ResourceExhausted and has
// to begin again. A term that begins so is the last from then on, before it has claimed anything.
func (e *Engine) WatchInstances(ctx context.Context, req *connect.Request[hearthv1.WatchInstancesRequest],
	stream *connect.ServerStream[hearthv1.WatchInstancesResponse],
) error {
	return e.watch(ctx, req.Msg.GetEpoch(), stream.Send)
}

func (e *Engine) watch(ctx context.Context, epoch int64, send func(*hearthv1.WatchInstancesResponse) error) error {
	if epoch < 0 {
		return connectError(invalid("epoch %d is negative", epoch))
	}
	if err := e.open(); err != nil {
		return connectError(err)
	}
	_ = e.admit(epoch) // who is too late is told so by what follows
	all, s := e.hub.subscribe()
	defer e.hub.unsubscribe(s)
	tell := func(p *hearthv1.Instance, epoch int64) error {
		return send(&hearthv1.WatchInstancesResponse{
			Event: &hearthv1.WatchInstancesResponse_Instance{Instance: proto.CloneOf(p)}, Node: e.cfg.Node, Epoch: epoch,
		})
	}
	epoch = e.hub.currentEpoch()
	for _, p := range all {
		if err := tell(p, epoch); err != nil {
			return err
		}
	}
	err := send(&hearthv1.WatchInstancesResponse{
		Event: &hearthv1.WatchInstancesResponse_Synced{Synced: true}, Node: e.cfg.Node, Epoch: epoch,
	})
	if err != nil {
		return err
	}
	for {
		select {
		case c, ok := <-s.changes:
			if !ok {
				return e.watchEnded(s)
			}
			if !sleep(ctx, newsDelay) {
				return nil
			}
			for left := len(s.changes); ; left-- {
				if err := tell(c.instance, c.epoch); err != nil {
					return err
				}
				if left == 0 {
					break
				}
				if c, ok = <-s.changes; !ok {
					return e.watchEnded(s)
				}
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func (e *Engine) watchEnded(s *subscriber) error {
	e.hub.mu.Lock()
	defer e.hub.mu.Unlock()
	if s.slow {
		return connect.NewError(connect.CodeResourceExhausted, errors.New("too slow: subscribe again"))
	}
	return connectError(errStopping)
}
