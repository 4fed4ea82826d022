package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

const (
	// NetworkPatience is a Config.Patience that outlasts a take-over on a network: 3 s until a leader that has died without a word is
	// noticed, and meanwhile 4 s until its lease ends and another has begun.
	NetworkPatience = 10 * time.Second

	resolveInterval = time.Second // while no leader is known
	refreshInterval = 15 * time.Second
	resolveTime     = 2 * time.Second
	minSeek         = 100 * time.Millisecond // between two questions to one poolmanager
	maxSeek         = time.Second
	awaitTime       = time.Second     // for which a call waits for a leader
	staleTime       = 3 * time.Second // for which a leader of an earlier term is not believed
	doubtInterval   = time.Second
	doubtTime       = 4 * time.Second
	quietTime       = 2 * time.Second // of a search, before it is logged
	// termBits are those of a version that count within a term: versions of a later term are greater.
	termBits = 32
)

// LeaderConfig says where poolmanagers are.
type LeaderConfig struct {
	// Resolve names the addresses of all.
	Resolve func(ctx context.Context) ([]string, error)
	// Connect gives the one at an address, and what closes its connections that nobody uses. A Watch there must end when it has died.
	Connect func(address string) (p Pool, closeIdle func())
	Logger  *slog.Logger
}

// Leader is a Pool: whichever of several poolmanagers leads. It is the one that answers to Watch, which the others refuse as unavailable;
// calls go where a Watch goes on. When that ends, calls under way fail as unavailable, so that they are made again, all poolmanagers
// are asked at once until one answers, and calls wait for that a little. A Watch has to be under way for calls to be answered.
type Leader struct {
	config LeaderConfig
	doubts chan struct{} // holds one: a call was answered as unavailable, so another may lead by now

	mu      sync.Mutex // guards what follows
	term    int64      // the latest that any of them has named
	tenure  *tenure    // nil: nobody is known to lead
	begun   chan struct{}
	members map[string]*member
	lastErr error // why there is no leader
}

var _ Pool = (*Leader)(nil)

// member is one of the poolmanagers.
type member struct {
	Pool
	address   string
	closeIdle func()
}

// tenure is as long as a Watch of one leader goes on.
type tenure struct {
	*member
	ctx  context.Context //nolint:containedctx // it is an event, that calls wait for beside their own contexts
	over context.CancelCauseFunc
}

// NewLeader returns a Pool of which nothing has been asked yet.
func NewLeader(c LeaderConfig) *Leader {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Leader{
		config: c, doubts: make(chan struct{}, 1), begun: make(chan struct{}), members: map[string]*member{},
		lastErr: errors.New("none has answered yet"),
	}
}

// Allocate claims one Instance. Errors carry connect codes.
func (l *Leader) Allocate(ctx context.Context, req *hearthv1.AllocateRequest) (res *hearthv1.AllocateResponse, err error) {
	err = l.call(ctx, func(ctx context.Context, p Pool) error {
		res, err = p.Allocate(ctx, req)
		return err
	})
	return res, err
}

// Report delivers measured load.
func (l *Leader) Report(ctx context.Context, req *hearthv1.ReportRequest) error {
	return l.call(ctx, func(ctx context.Context, p Pool) error { return p.Report(ctx, req) })
}

// Release gives an Instance back.
func (l *Leader) Release(ctx context.Context, req *hearthv1.ReleaseRequest) error {
	return l.call(ctx, func(ctx context.Context, p Pool) error { return p.Release(ctx, req) })
}

// call calls the leader for as long as it is one.
func (l *Leader) call(ctx context.Context, do func(context.Context, Pool) error) error {
	t, err := l.await(ctx)
	if err != nil {
		return err
	}
	bound, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(t.ctx, cancel)
	err = do(bound, t.Pool)
	stop()
	cancel()
	code := connect.CodeOf(err)
	switch {
	case err == nil:
		return nil
	case t.ctx.Err() != nil && ctx.Err() == nil && (code == connect.CodeCanceled || code == connect.CodeUnavailable):
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("poolmanager at %s does not lead any more: %w", t.address, context.Cause(t.ctx)))
	case code == connect.CodeUnavailable:
		signal(l.doubts)
	}
	return err
}

// await gives who leads, for which it waits a little.
func (l *Leader) await(ctx context.Context) (*tenure, error) {
	var late <-chan time.Time
	for {
		l.mu.Lock()
		t, begun := l.tenure, l.begun
		l.mu.Unlock()
		if t != nil {
			return t, nil
		}
		if late == nil {
			timer := time.NewTimer(awaitTime)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case <-begun:
		case <-late:
			return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("no poolmanager leads: %w", l.reason()))
		case <-ctx.Done():
			return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("no poolmanager leads: %w", ctx.Err()))
		}
	}
}

// Watch looks for who leads, for as long as that takes, and calls event for each of its messages until it leads no more.
func (l *Leader) Watch(ctx context.Context, subscriber string, event func(*hearthv1.WatchResponse)) error {
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	found, err := l.find(ctx, work.Go, subscriber)
	if err != nil {
		return err
	}
	return l.follow(ctx, work.Go, found, event)
}

// candidate is a Watch that has been answered.
type candidate struct {
	*member
	messages chan *hearthv1.WatchResponse
	ended    chan error // holds one
}

// find asks all until one answers. What it begins ends with ctx, and but for the Watch that was answered with find.
func (l *Leader) find(ctx context.Context, begin func(func()), subscriber string) (*candidate, error) {
	searching, stop := context.WithCancel(ctx)
	defer stop()
	found, lists := make(chan *candidate), make(chan []string)
	begin(func() { l.resolve(searching, lists) })
	asked := map[string]context.CancelFunc{}
	begun := time.Now()
	ask := func(addresses []string) {
		for _, m := range l.at(addresses) {
			if asked[m.address] == nil {
				own, end := context.WithCancel(ctx)
				asked[m.address] = end
				begin(func() { l.seek(own, m, subscriber, begun, found) })
			}
		}
	}
	ask(l.known()) // at once: names may be unknown just because of what has killed the leader
	quiet := time.NewTimer(quietTime)
	defer quiet.Stop()
	for {
		select {
		case addresses := <-lists:
			ask(addresses)
		case <-quiet.C:
			l.config.Logger.Warn("no poolmanager leads", "asked", len(asked), "err", l.reason())
		case c := <-found:
			for address, end := range asked {
				if address != c.address {
					end()
				}
			}
			return c, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// resolve tells of addresses until ctx is done.
func (l *Leader) resolve(ctx context.Context, lists chan<- []string) {
	for ctx.Err() == nil {
		bound, cancel := context.WithTimeout(ctx, resolveTime)
		addresses, err := l.config.Resolve(bound)
		cancel()
		if err != nil {
			l.failed(fmt.Errorf("resolve: %w", err))
		} else {
			select {
			case lists <- addresses:
			case <-ctx.Done():
			}
		}
		sleep(ctx, resolveInterval)
	}
}

// at gives the poolmanagers at addresses, and forgets the others.
func (l *Leader) at(addresses []string) (all []*member) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := map[string]*member{}
	for _, address := range addresses {
		m := l.members[address]
		if m == nil {
			p, closeIdle := l.config.Connect(address)
			m = &member{p, address, closeIdle}
		}
		now[address] = m
		all = append(all, m)
	}
	l.members = now
	return all
}

func (l *Leader) known() (addresses []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for address := range l.members {
		addresses = append(addresses, address)
	}
	return addresses
}

// seek asks one poolmanager until it answers as a leader. Then it goes on with that Watch, until that ends.
func (l *Leader) seek(ctx context.Context, m *member, subscriber string, begun time.Time, found chan<- *candidate) {
	defer m.closeIdle() // those who do not lead are not called
	for ctx.Err() == nil {
		c := &candidate{m, make(chan *hearthv1.WatchResponse), make(chan error, 1)}
		offered := false
		watching, end := context.WithCancel(ctx)
		err := m.Watch(watching, subscriber, func(message *hearthv1.WatchResponse) {
			if watching.Err() != nil {
				return
			}
			if !offered {
				if !l.believable(message, begun) {
					end()
					return
				}
				offered = true
				select {
				case found <- c:
				case <-watching.Done():
				}
			}
			select {
			case c.messages <- message:
			case <-watching.Done():
			}
		})
		end()
		if offered {
			c.ended <- err
			return
		}
		l.failed(fmt.Errorf("%s: %w", m.address, err))
		pause := min(max(time.Since(begun)/20, minSeek), maxSeek)
		sleep(ctx, pause/2+rand.N(pause/2))
	}
}

// termOf is the term in which a message was sent, or 0 if it does not say.
func termOf(m *hearthv1.WatchResponse) int64 { return m.GetEndpoints().GetVersion() >> termBits }

// believable says whether a first message may be a leader's: one of an earlier term has only not heard yet that it leads no more. That is not
// held against anyone for ever: terms may begin anew.
func (l *Leader) believable(first *hearthv1.WatchResponse, begun time.Time) bool {
	term := termOf(first)
	l.mu.Lock()
	defer l.mu.Unlock()
	if term == 0 || term >= l.term {
		return true
	}
	if time.Since(begun) < staleTime {
		return false
	}
	l.term = term
	return true
}

// heard takes in a term that somebody has named, and says whether it is later than all before.
func (l *Leader) heard(m *hearthv1.WatchResponse) bool {
	term := termOf(m)
	l.mu.Lock()
	defer l.mu.Unlock()
	later := term > l.term
	l.term = max(l.term, term)
	return later
}

func (l *Leader) failed(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lastErr = err
}

func (l *Leader) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastErr
}

// follow has calls go to who was found, and hands its messages on, until it leads no more.
func (l *Leader) follow(ctx context.Context, begin func(func()), c *candidate, event func(*hearthv1.WatchResponse)) error {
	over := l.enter(ctx, c.member)
	l.config.Logger.Info("poolmanager leads", "address", c.address)
	deposed := make(chan error, 1)
	refresh := time.NewTicker(refreshInterval) // of the addresses: names may not be known when it is needed
	defer refresh.Stop()
	var asked time.Time
	for {
		select {
		case m := <-c.messages:
			l.heard(m)
			event(m)
		case err := <-c.ended:
			err = cmp.Or(err, errEnded)
			over(err)
			return err
		case err := <-deposed:
			over(err)
			return err
		case <-l.doubts:
			if now := time.Now(); now.Sub(asked) >= doubtInterval {
				asked = now
				begin(func() { l.doubt(ctx, c.address, deposed) })
			}
		case <-refresh.C:
			begin(func() { l.others(ctx, c.address) })
		case <-ctx.Done():
			over(ctx.Err())
			return ctx.Err()
		}
	}
}

var errEnded = errors.New("the stream ended")

func (l *Leader) enter(ctx context.Context, m *member) (over context.CancelCauseFunc) {
	t := &tenure{member: m}
	t.ctx, t.over = context.WithCancelCause(ctx)
	l.mu.Lock()
	l.tenure = t
	close(l.begun)
	l.begun = make(chan struct{})
	l.mu.Unlock()
	return func(why error) {
		l.mu.Lock()
		l.tenure, l.lastErr = nil, why
		l.mu.Unlock()
		t.over(why)
	}
}

// doubt asks the others whether one leads in a later term than the leader that is followed, which may be cut off from all but us.
func (l *Leader) doubt(ctx context.Context, leader string, deposed chan<- error) {
	ctx, cancel := context.WithTimeout(ctx, doubtTime)
	defer cancel()
	var asked sync.WaitGroup
	defer asked.Wait()
	for _, m := range l.others(ctx, leader) {
		asked.Go(func() {
			defer m.closeIdle()
			own, end := context.WithCancel(ctx)
			defer end()
			_ = m.Watch(own, "", func(first *hearthv1.WatchResponse) { // it refuses, or it leads
				if end(); !l.heard(first) {
					return
				}
				select {
				case deposed <- fmt.Errorf("another leads, at %s", m.address):
				default:
				}
			})
		})
	}
}

// others resolves addresses anew, as far as that is possible, and gives the poolmanagers there but for the leader, who is kept.
func (l *Leader) others(ctx context.Context, leader string) []*member {
	ctx, cancel := context.WithTimeout(ctx, resolveTime)
	defer cancel()
	addresses, err := l.config.Resolve(ctx)
	if err != nil {
		addresses = l.known()
	}
	if !slices.Contains(addresses, leader) {
		addresses = append(slices.Clone(addresses), leader)
	}
	return slices.DeleteFunc(l.at(addresses), func(m *member) bool { return m.address == leader })
}
