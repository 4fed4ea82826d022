package pool

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// streamEvents is how many changes a subscriber may be behind before it is sent away to begin anew.
const streamEvents = 1024

// stream is one open Watch. Its fields are guarded by Manager.mu; events and ended may be received from without it.
type stream struct {
	events chan *hearthv1.Endpoints
	ended  chan struct{}
	err    error
}

func (s *stream) end(err error) {
	if s.err == nil {
		s.err = err
		close(s.ended)
	}
}

// Subscribe sends the Endpoints of every Function in the order of their versions, then the mark, then every change as it happens,
// until ctx ends, send fails, the Manager stops, or send is so slow that the subscriber falls behind. A named subscriber takes part
// in draining from the beginning of Subscribe until a while after its end. It says why it ended.
func (m *Manager) Subscribe(ctx context.Context, name string, send func(*hearthv1.WatchResponse) error) error {
	if len(name) > maxIDBytes {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("subscriber: the name is too long"))
	}
	if err := m.awaitGathered(ctx); err != nil {
		return err
	}
	s, opening, err := m.subscribe(name)
	if err != nil {
		return err
	}
	defer m.unsubscribe(name, s)
	for _, e := range opening {
		if err := send(&hearthv1.WatchResponse{Event: &hearthv1.WatchResponse_Endpoints{Endpoints: e}}); err != nil {
			return err
		}
	}
	if err := send(&hearthv1.WatchResponse{Event: &hearthv1.WatchResponse_Synced{Synced: true}}); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.ended:
			m.mu.Lock()
			defer m.mu.Unlock()
			return s.err
		case e := <-s.events:
			select {
			case <-time.After(newsDelay):
			case <-ctx.Done():
				return ctx.Err()
			}
			for left := len(s.events); ; left-- {
				if err := send(&hearthv1.WatchResponse{Event: &hearthv1.WatchResponse_Endpoints{Endpoints: e}}); err != nil {
					return err
				}
				if left == 0 {
					break
				}
				e = <-s.events
			}
		}
	}
}

// newsDelay keeps word of a start off the cores until the gateway that asked for it has its answer, which says the same.
const newsDelay = 3 * time.Millisecond

func (m *Manager) subscribe(name string) (*stream, []*hearthv1.Endpoints, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.running {
		return nil, nil, unavailable(errShutdown)
	}
	m.publish()
	s := &stream{events: make(chan *hearthv1.Endpoints, streamEvents), ended: make(chan struct{})}
	sub := m.subscribers[name]
	if sub == nil {
		sub = &subscriber{streams: map[*stream]struct{}{}}
		m.subscribers[name] = sub
		// One without a name watches, but nothing waits for it.
		if name == "" {
			sub.version = 1<<63 - 1
		}
	}
	if len(sub.streams) == 0 && name != "" {
		sub.version = 0 // it may be another process, which has seen nothing yet
	}
	sub.streams[s], sub.lost = struct{}{}, time.Time{}
	var opening []*hearthv1.Endpoints
	for _, f := range m.functions {
		opening = append(opening, m.endpoints(f))
	}
	for function, version := range m.tombstones {
		opening = append(opening, &hearthv1.Endpoints{Function: function, Version: version, Deleted: true})
	}
	slices.SortFunc(opening, func(a, b *hearthv1.Endpoints) int { return cmp.Compare(a.GetVersion(), b.GetVersion()) })
	return s, opening, nil
}

func (m *Manager) unsubscribe(name string, s *stream) {
	m.fact(func(now time.Time) {
		sub := m.subscribers[name]
		delete(sub.streams, s)
		if len(sub.streams) == 0 {
			sub.lost = now
		}
	})
}

// expireSubscribers drops those whose stream ended a while ago, so that nothing waits for them any more.
func (m *Manager) expireSubscribers(now time.Time) {
	for name, s := range m.subscribers {
		if s.lost.IsZero() {
			continue
		}
		if end := s.lost.Add(subscriberGone); now.Before(end) {
			m.at(end)
			continue
		}
		delete(m.subscribers, name)
	}
}

// Acknowledge says that a gateway acts upon the Endpoints of that version, and how many requests it has in flight on which
// Instances; those left out have none. It does not block.
func (m *Manager) Acknowledge(name string, version int64, inFlight map[string]int32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.subscribers[name]
	if s == nil || name == "" {
		return
	}
	s.version, s.inFlight = version, inFlight
	close(m.acknowledged)
	m.acknowledged = make(chan struct{})
	for i := range m.index.restless {
		if i.drain != nil && i.discard == nil && !i.freezing {
			m.step(time.Now())
			return
		}
	}
}

// knownTime bounds how long an Apply waits for gateways: one that hangs must not keep a Function from being deployed.
const knownTime = 2 * time.Second

// awaitKnown waits until every gateway that watches acts upon what a Function is now, so that whoever deployed it can ask for it
// at once.
func (m *Manager) awaitKnown(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, knownTime)
	defer cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.functions[name]
	if f == nil {
		return
	}
	for version := f.version; !m.actUpon(version); { // not f's latest: it changes with each of its Instances
		more := m.acknowledged
		m.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
		}
		m.mu.Lock()
		if ctx.Err() != nil {
			return
		}
	}
}

// actUpon tells whether every gateway that watches has acknowledged a version.
func (m *Manager) actUpon(version int64) bool {
	for _, s := range m.subscribers {
		if s.lost.IsZero() && s.version < version {
			return false
		}
	}
	return true
}

// publish sends an Endpoints event for each Function that changed.
func (m *Manager) publish() {
	for f := range m.changed {
		delete(m.changed, f)
		if m.functions[f.name] != f {
			continue // its tombstone has been sent
		}
		m.version++
		f.version = m.version
		for i := range m.index.restless {
			if i.function == f.name && i.drain != nil && i.drain.version == 0 {
				i.drain.version = f.version
			}
		}
		m.send(m.endpoints(f))
	}
}

func (m *Manager) send(e *hearthv1.Endpoints) {
	for _, sub := range m.subscribers {
		for s := range sub.streams {
			select {
			case s.events <- e:
			default:
				m.metrics.slow.Inc()
				s.end(connect.NewError(connect.CodeResourceExhausted, errors.New("the subscriber is too slow; watch again")))
			}
		}
	}
}

// endpoints is a Function as gateways see it. What it returns is not changed afterwards.
func (m *Manager) endpoints(f *function) *hearthv1.Endpoints {
	e := &hearthv1.Endpoints{Function: f.name, Version: f.version, Spec: f.public, Revision: f.revision.GetName()}
	for i := range m.index.functions[f.name] {
		if i.state != hearthv1.State_STATE_SERVING && i.state != hearthv1.State_STATE_DRAINING || i.away {
			continue // one that is left out may be listed again, and one that drains may not
		}
		said := i.message()
		if !i.routable() {
			said.State = hearthv1.State_STATE_DRAINING
		}
		e.Instances = append(e.Instances, said)
	}
	slices.SortFunc(e.Instances, func(a, b *hearthv1.Instance) int { return cmp.Compare(a.GetId(), b.GetId()) })
	return e
}

func (i *instance) message() *hearthv1.Instance {
	return &hearthv1.Instance{Id: i.id, Node: i.node, State: i.state, Degree: i.degree, Address: i.address, Claim: i.claim,
		Function: i.function, Revision: i.revision, CreatedAt: timestamppb.New(i.created), Runtime: i.kind.runtime,
		RuntimeGeneration: i.kind.generation, Version: i.version, MemoryBytes: i.memory,
		Pod: i.podID(), Tenant: i.group.tenant, Group: i.group.name}
}
