"""The words behind `messages.py`: phrases of 16 intents, vague phrases with their laws, forms that join them.

Data only; `messages.py` draws from it. All sentences are our own. Choices:

- `(a|b|)` is a choice with equal chances, an empty branch leaves the words out; ` / ` parts two phrases that
  share a line; `{item}` is a slot, drawn once per message: the request names the item of the complaint.
  `{item2}` is another value of the same slot, never the same one.
- Each line of an intent starts with the part it plays: `fact` what happened; `ask` the request as a sentence;
  `want` goes behind "I want to"; `done` says it is settled; `deny` says it is not so; `topic` goes behind
  "about". `near` lists the intents that a negated message of this one may deny and still make sense.
- Intents share their words (money, card, box, wrong, back, account) on purpose, and the lines of one intent
  share few: otherwise counting words would solve the task.
"""

from typing import Final

PHRASES: Final[dict[str, str]] = {
    "track parcel": """
near: cancel order, change address, refund, transfer late, return
fact: (my|the) (parcel|package|order) (still hasn't|has not) (arrived|turned up|come)( yet|)
fact: the {item} was (due|promised for) {pastday} and (the doorbell never rang|I am still waiting)
fact: the status page has shown the same line {since} and my {item} (does not move|is nowhere)
fact: it's been {span} and there's no sign of (the|my) {item}
fact: the courier says he handed it over {pastday}, but there is nothing at my door
ask: where is (it|my {item}|my parcel|my order) (now|right now|at the moment)?
ask: when will (my|the) {item} (get here|be delivered|arrive)?
ask: could you (check|look up) (how far away it is|which depot it is in|what is holding up the delivery)?
ask: has my {item} (even|actually) (been sent|left the warehouse)( yet|)?
ask: will it (reach me|be here) before {nextday}?
want: know where (my {item}|the parcel|my order) is / find out when the {item} (comes|will be here)
want: (hear|have) a delivery date for the {item}
done: the parcel with the {item3} turned up {pastday} / the delivery I was missing has come now
deny: I (know|can see) where the parcel is / the parcel (is here|did arrive)
topic: the late parcel / the missing {item3}
""",
    "parcel damaged": """
near: wrong item, return, track parcel, refund
fact: the {item} (came|arrived|was delivered) (in pieces|with a dent|scratched all over|with a crack in it)
fact: the box was (crushed|soaked|ripped open) when I got it and the {item} (is ruined|did not survive)
fact: I (opened|unpacked) the (parcel|order) {pastday} and the {item} (fell apart|was in two pieces)
fact: one corner of the {item} (is smashed|has broken off), (somebody dropped it|it was packed badly)
fact: bits of plastic fell out when I took the {item} out of its wrapping
ask: (who do I tell|how do I report) that my {item} (got broken|was smashed) on the way?
ask: (do you need|where do I send) photos of the (dent|crack|broken part|smashed corner)?
ask: can you send me another one for the {item} that (broke|got crushed) (on the way|in the van)?
ask: what happens now that my order (came|reached me) in pieces?
want: report a (broken|smashed|dented) {item} / show you what the courier did to my {item}
want: have the cracked {item} replaced
done: the cracked {item3} has been replaced (already|)
done: you (already|) sent me a new {item3} for the broken one
deny: nothing (is|was) broken / the {item} is (in one piece|not damaged|in perfect shape)
topic: the broken {item3} / the dent in my {item3}
""",
    "wrong item": """
near: parcel damaged, return, track parcel, refund
fact: I (ordered|paid for|asked for) a {item} and (got|received|you sent) a {item2}( instead|)
fact: the {item} (has the wrong colour|is the wrong model), I (chose|wanted) the (blue|black|green|white) one
fact: there was a {item2} in the box where my {item} should have been
fact: somebody mixed up the labels, this {item2} (belongs to|was meant for) another customer
fact: what came {pastday} (does not match|has nothing to do with) (the invoice|the picture in the app)
ask: (can|could) you send (the {item} I actually ordered|me the right one|what I paid for)?
ask: why did I (get|receive) a {item2}?
ask: what do I do with a {item2} I never ordered?
ask: how can it be that the invoice says {item} and the box says {item2}?
want: (get|have) the {item} I (actually|really) ordered / swap the {item2} for the right one
want: tell you that you sent me the wrong (thing|model|colour)
done: the mix-up with the {item3} is (sorted out|cleared up) / the right {item3} (came|arrived) {pastday}
deny: it is exactly (what|the model) I ordered / the {item} is the right one
topic: the mix-up with the {item3} / the {item3} I never ordered
""",
    "cancel order": """
near: return, change address, track parcel, cancel transfer, refund
fact: I pressed the buy button (too early|by accident) and (don't|do not) need the {item}
fact: I (found|saw) the {item} cheaper (somewhere else|in town) and you have not (sent|packed) mine yet
fact: my {person} has just bought me a {item}, so there is no need to send the one from this morning
fact: I changed my mind about the {item}, it (is not packed yet|has not left the warehouse)
fact: the {item} only comes after {nextday}, that is too late for me, so don't send it
ask: can you (stop|call off|cancel) (my order|the {item}) before it (ships|leaves the warehouse|goes out)?
ask: please (do not|don't) (send|pack|ship) the {item}.
ask: (is it too late|would it be possible) to (take back|withdraw) (my order|an order) from this morning?
ask: how do I take the {item} out of an order I placed {pastday}?
want: cancel (my order|the {item}|the order from this morning) / call off the (order|purchase)
want: stop the {item} from being sent
done: (the|my) order for the {item3} (is|has been) cancelled (already|)
done: you (already|) took the {item3} off my order
deny: I am not cancelling anything / the order can stay as it is
topic: cancelling the {item3} / an order I wanted to call off
""",
    "change address": """
near: track parcel, cancel order, login, close account
fact: I moved (to {city}|house) {pastday} and (you still have|my order is going to) my old (street|place|flat)
fact: I typed the wrong (house number|street|postcode) (when I ordered|at the checkout)
fact: the {item} is going to my (office|old flat), but I am in {city} until {nextday}
fact: nobody will be at that door (on {day2}|this week), but my neighbour can take the {item}
fact: the confirmation shows a street I left {span} ago
ask: can (it|the parcel|my {item}) go to (my office|a pick-up point|my new flat|{city}) instead?
ask: where (can|do) I (enter|put in) (a|my) new (street|postcode|home)?
ask: could the courier bring my {item} to a different (door|street|town)?
ask: please send (letters and parcels|everything) to my new (flat|house) from (now on|{day2} on).
want: have the {item} sent to (my office|another street|my new flat) / change (the|my) delivery address
want: correct the (postcode|house number) on my order
done: my new address is (already|) in your system / the wrong (postcode|street) has been corrected
deny: (the|my) address is (right|correct|still the same) / I have not moved
topic: my new address / the wrong postcode
""",
    "return": """
near: refund, wrong item, parcel damaged, cancel order
fact: the {item} is (too big|too small|too heavy|not my taste) and I would rather not keep it
fact: my {person} (does not like|already has) the {item} I (gave away|bought as a present)
fact: I have had the {item} for {span} and it (just does not suit me|is still in its box)
fact: the {item} works (fine|perfectly) but I (do not need it|bought it on a whim) and the box is packed again
fact: now that I see the {item} at home, I would rather not keep it
ask: where (do I get|can I print) the label to (post|send) it back?
ask: how (long|many days) do I have to (bring|send) (the|my) {item} back?
ask: can (someone|the courier) (collect|pick up) the {item} I do not want to keep?
ask: do you take the {item} back (without the box|after {span}|without a receipt)?
want: (send|bring|give) the {item} back / return (the|my) {item} / post the {item} back to you
done: the {item3} went back to you {pastday} / I (have already|already) sent the {item3} back
deny: I am (keeping|happy with) the {item3} / I (like|want to keep) the {item3}
topic: sending back the {item3} / the return label for the {item3}
""",
    "refund": """
near: return, track parcel, charged twice, transfer late, unknown charge
fact: I sent the {item} back {span} ago and (nothing has been paid out|my {amount} never came)
fact: you (promised|agreed) to give me {amount} back and my (account|balance) (is|looks) the same
fact: the shop wrote that my {amount} went out {pastday}, but (I see nothing|nothing has come in)
fact: it's been {span} since you collected the {item} and I am still out of pocket
fact: I paid {amount} for an order you called off and you still have it
ask: when do I (get|see) my (money|{amount}) again?
ask: how long (does|will) it take until you pay me back( for the {item}|)?
ask: can you pay the {amount} back (to my card|into my account)?
ask: where is the money for the {item} I (sent|gave) back?
want: have my money back / get the {amount} back for the {item} / be paid back for the {item}
done: the money for the {item3} is back (on my card|in my account)
done: you have (already|) paid me back for the {item3}
deny: I (do not|don't) (want|need) my money back / you can keep the money
topic: my refund / the money for the {item3}
""",
    "card lost": """
near: card declined, unknown charge, login, close account
fact: my (purse|wallet|bag) (was stolen|got lost) (on the train|in {city}) {pastday}, with my card in it
fact: I (cannot|can't) find my card, I last (had|used) it at a (petrol station|cash machine|checkout)
fact: I left my card (in a taxi|in the cash machine|at a checkout|at a hotel) in {city}
fact: my card must have (fallen|slipped) out of my (pocket|coat|bag) {pastday}
fact: a thief took my (bag|wallet|purse) {pastday} and can now pay with my account
ask: can you (block|freeze|lock) my card (at once|before anyone uses it) and (send|post) me a new one?
ask: what (should|do) I do if (somebody|someone) else has my card?
ask: how (fast|soon) (can I have|do I get) a new card for the one I (lost|left behind)?
ask: please (freeze|block) my card, it is somewhere in {city}.
want: report (a|my) (lost|stolen) card / block a card I (no longer have|cannot find)
want: have the card replaced that was stolen in {city}
done: my (lost|missing) card (turned up|was found) {pastday}
done: the stolen card has (already|) been (blocked|replaced)
deny: I have my card (right here|in my hand|in my wallet) / the card is not (lost|stolen)
topic: my lost card / the stolen wallet
""",
    "card declined": """
near: card lost, login, transfer late, fees, charged twice
fact: my card was (refused|declined|turned down) at (the|a) (checkout|petrol station|restaurant) {pastday}
fact: I was at the checkout in {city} with a full account and the (terminal|machine) (said no|showed an error)
fact: the (website|shop|terminal) will not (take|accept) my card (for the {item}|when I pay {amount})
fact: the cash machine (spits out|rejects) my card every time
fact: paying with my (phone|card) (stopped working|fails) {since}, although there is money in the account
ask: why (does|did) my card not (work|go through) (at the checkout|when I want to pay|in {city})?
ask: is there a (limit|block|lock) on my card( that I do not know about|)?
ask: what is wrong with my card if (there is money on it|it was fine {pastday})?
ask: can you make my card work (again|in {city}|abroad) before {nextday}?
want: pay with my card again / know why my card (gets refused|was declined)
want: get my card to work (abroad|in {city}|at the checkout)
done: my card (works|goes through) again / the shop takes my card again
deny: my card works (fine|everywhere) / no payment was refused
topic: my declined card / the card that did not work in {city}
""",
    "unknown charge": """
near: charged twice, fees, card lost, refund, card declined
fact: there is a payment of {amount} (on my statement|in my app) that I (never made|know nothing about)
fact: (somebody|someone) (paid|spent) {amount} (with my card|from my account) in {city}, and it was not me
fact: a (shop|company) I have never heard of took {amount} (from my account|off my card) {pastday}
fact: I was looking through my statement and {amount} for a hotel in {city} is not mine
fact: I bought nothing this week, (yet|but) {amount} left my account {pastday}
ask: what is the {amount} payment (from {day}|on my card)?
ask: who (took|charged) {amount} (from my account|to my card) (on {day}|{pastday})?
ask: can you tell me which (shop|company) is behind the {amount} (from {day}|on my statement)?
ask: how can {amount} (leave|go from) my account without me (doing anything|buying anything)?
want: (dispute|question|report) a payment I (did not make|never approved)
want: know who took {amount} (from my account|off my card)
want: find out what the {amount} on my statement was for
done: I found out what the strange payment was / the payment I did not recognise was made by my {person}
deny: I know every payment on the list / all the payments are mine
topic: a strange payment / a payment I do not recognise
""",
    "charged twice": """
near: unknown charge, fees, refund, cancel order
fact: the {item} was (taken off|charged to) my (card|account) two times
fact: I (bought|ordered) one {item} and (paid|see) {amount} twice
fact: {amount} left my account {pastday}, and the same amount again (an hour later|the next day)
fact: the (checkout|app|page) froze, I pressed pay again, and now both payments went through
fact: the same (bill|invoice|amount) was collected on {day} and again a day later
ask: why (did|do) I (pay|get billed) (two times|double|twice) for (one|a single) {item}?
ask: can you (take away|remove) one of the two payments (for the {item}|of {amount})?
ask: is one of the two {amount} payments going to (vanish|drop off|be reversed)?
ask: how did (one|a single) order turn into two payments?
want: have the second payment (removed|reversed) / (report|clear up) a double (payment|charge)
want: stop paying twice for one {item}
done: the double payment for the {item3} (has been|was) (reversed|corrected)( already|)
done: the second debit has gone again
deny: I (only paid once|was only billed once) / the amount was taken only once
topic: the double payment / paying twice for the {item3}
""",
    "transfer late": """
near: refund, cancel transfer, track parcel, card declined, unknown charge
fact: I sent {amount} to {payee} {pastday} and (it has not|nothing has) (arrived|come in|got there)
fact: {payee} (still has not|hasn't) (got|received|seen) the {amount} I (sent|paid) {pastday}
fact: my (salary|rent money) was due on my account on {day} and (it is not here|nothing came)
fact: the app has said "sent" {since}, but {payee} (keeps asking|is still waiting) for the {amount}
fact: the {amount} for {payee} (left|went from) my account {pastday} and is stuck between the banks
ask: where is the (money|{amount}) I (sent|wired) to {payee}?
ask: how long (does|can) money to a (different|foreign) bank take to arrive?
ask: when will {payee} (see|get|have) (the money|the {amount})?
ask: what is holding up the {amount} I (sent|paid) to {payee}?
want: know where my transfer is / find out why {payee} (has not|hasn't) got the money
want: trace the {amount} I sent to {payee}
done: the transfer to {payee2} (arrived|went through) {pastday} / {payee2} has received the money now
deny: the transfer (has arrived|went through) / {payee} has the money
topic: the slow transfer / the money for {payee2}
""",
    "cancel transfer": """
near: cancel order, transfer late, refund, unknown charge
fact: I (sent|paid) {amount} to the wrong (person|account) {pastday}
fact: I typed one (digit|number) wrong when I sent the {amount} to {payee}
fact: I meant to send {payee} less, not {amount}, and it has not been booked yet
fact: I (set up|scheduled) a payment of {amount} for {day} that should not go out
fact: {payee} got the money in cash already, so the {amount} I scheduled should stay here
fact: I pressed send (too early|by accident) and {amount} is (on its way|going) to {payee}
ask: can you (stop|call back|hold) the (payment|{amount}) to {payee} before it (goes out|arrives|is booked)?
ask: (is it too late|would it be possible) to (take back|withdraw) {amount} I sent this morning?
ask: how do I (delete|take out) a (scheduled|planned) (payment|transfer) to {payee}?
ask: please (do not|don't) (send|book) the {amount} to {payee}.
want: (stop|call back|cancel) (the|my) (transfer|payment) to {payee} / take back the {amount} I sent
want: undo a (payment|transfer) to {payee}
done: the mistaken transfer has been (stopped|called back)( already|)
done: you already stopped the payment to {payee2}
deny: (the|my) transfer can go out as it is / I do not want to call back any money
topic: a transfer I wanted to stop / the payment to the wrong (person|account)
""",
    "login": """
near: close account, card declined, card lost, change address, unknown charge
fact: I (forgot|can't remember) (my|the) (password|passcode|sign-in code)
fact: the app (throws me out|shows an error) every time I (enter|type) my (code|password|email)
fact: I have a new phone {since} and the app (does not know me|wants a code I never get)
fact: the (text message|email) with the code (never comes|comes too late)
fact: after three wrong tries (I am|my account is) locked( until {nextday}|)
ask: how (can|do) I (set|choose|get) a new (password|code)?
ask: can you (let me back in|unlock my account|send me a new code)?
ask: why (will|does) the (app|site) not (accept|take) my (password|code|email)?
ask: what do I do when the app does not know my (phone|email) any more?
want: (sign in|log in|get into my account) again / reset my password / use the app on my new phone
done: I (am|got) back into (the app|my account) / the new password works
deny: I can (sign|log) in just fine / my password works
topic: my forgotten password / the trouble with signing in
""",
    "close account": """
near: login, cancel order, card lost, change address, fees
fact: I no longer use (the app|my account) and do not want to keep it
fact: I am (moving|switching) to another bank and (will not need|do not need) this account after {nextday}
fact: I have not (bought|paid for) anything here for a year and would like to leave
fact: my {person} and I share one account now, so mine can go
fact: after {years} years I have had enough and you can delete everything about me
ask: how (can|do) I (close|end|delete) (my account|everything|my profile) for good?
ask: please (delete|remove) (my account|all my data|my profile)( completely|).
ask: what happens to the {amount} on my account when I (close it|leave)?
ask: can I (leave|quit) before {nextday}( or is there a notice period|)?
want: close my account / delete my profile / leave your bank
done: my old account (is|was) closed (already|{pastday}) / the account of my {person} has been deleted
deny: I am (staying with you|not leaving) / I want to stay a customer
topic: closing my old account / deleting my profile
""",
    "fees": """
near: unknown charge, charged twice, close account, transfer late, card declined
fact: you took {fee} for (taking out cash|paying by card) in {city} {pastday}
fact: my statement (shows|lists) {fee} for "(account care|service|card use)"
fact: sending money to {payee} in {city} cost me {fee} on top
fact: delivery of the {item} suddenly costs {fee}, last year it was free
fact: what I pay for the (account|card) each month went up by {fee}
ask: how much do you charge for (a transfer abroad|cash from a machine in {city}|a second card|a new card)?
ask: what does (the account|the card|sending money to {city}|express delivery) cost?
ask: why do I have to pay {fee} (extra|on top) for (the account|delivery|using my card abroad)?
ask: is (paying|getting cash) in {city} free with your card?
want: know what (the card|the account|a transfer abroad) costs / understand (the|your) (fees|prices)
want: know why (delivery|the account) is not free
done: the question about (your prices|the monthly fee) has been answered
done: I understand the fee for the withdrawal now
deny: I (know|accept) (what it costs|your fees) / the fee is not the problem
topic: your fees / the monthly price
""",
}

# Messages that can be two or three intents, each with the law its label is drawn from.
VAGUE: Final = """
law: track parcel 0.6, refund 0.4
I paid {amount} {pastday} and I have nothing in my hands, neither the {item} nor the money
the {item} was paid for {span} ago and I have heard nothing from you
you have my {amount}, but I do not have my {item}
law: return 0.5, wrong item 0.3, parcel damaged 0.2
the {item} is not (at all|) what I (expected|had in mind)
I am not happy with the {item} that came {pastday}
the {item} looked different (in the app|in the picture) and I cannot use it like this
law: unknown charge 0.5, fees 0.3, charged twice 0.2
my balance is {amount} lower than it should be
{amount} (is|seems to be) missing from my account {since}
I counted again and you took {amount} too much
law: transfer late 0.6, refund 0.4
I am (still|) waiting for {amount} {since}
my money (is still not here|has not come), and it was promised for {day}
I should have had {amount} on my account {pastday}, it is empty
law: card lost 0.5, card declined 0.5
I (need|want) (another|a new) card, I can't use (mine|the old one) any more
(I am in {city} without a card that I can use|I can't pay by card in {city})
something happened to my card {pastday} and now I have no way to pay
law: cancel order 0.5, cancel transfer 0.5
please stop what I did in the app {pastday}, it was a mistake
I pressed the wrong button this morning and {amount} is about to go out
can you undo what I (confirmed|clicked) {pastday} before it goes through?
law: login 0.6, card declined 0.4
the code is not accepted (any more|) and I am stuck
it says "not authorised" (whatever I try|every time) since {day}
I typed my (number|code) wrong three times and now nothing works
law: change address 0.6, track parcel 0.2, cancel order 0.2
I will not be at home when the {item} comes
I am away until {nextday} and the courier is coming on {day}
I am in {city} now and the {item} is on its way to my home
law: close account 0.7, login 0.3
I (give up|am tired of it), the app and I are no longer friends, please sort out my account
I have not been in my account for {span}, what can be done about it?
I do not get anywhere with this account {since}
law: unknown charge 0.35, login 0.35, card lost 0.3
I think somebody else (is using|got hold of) my account
I gave my (details|data) to a caller {pastday} and now I am worried
somebody in {city} seems to know my (details|data)
law: charged twice 0.5, fees 0.5
the {item} cost me {amount} more than the price in the app
I paid more for the {item} than I should have
the bill for the {item} is too high by {amount}
law: cancel transfer 0.5, change address 0.5
I made a mistake in the details I sent you {pastday}
there is a wrong number in the form I sent off {pastday}
I mixed up two (numbers|names) in the app {pastday} and it is already confirmed
law: parcel damaged 0.6, wrong item 0.4
I opened the box {pastday} and the {item} cannot be used
the box with the {item} is here, but something is wrong with it
part of the {item} is not as it should be
law: return 0.6, cancel order 0.4
I have (no use|no need) for the {item} any more
I (changed my mind|thought again) about the {item} I bought {pastday}
my {person} has the same {item}, so I do not need two
"""

# Pairs between which a customer can hesitate; the form says how likely the first of the two is.
PAIRS: Final[tuple[tuple[str, str], ...]] = (
    ("refund", "return"),
    ("return", "wrong item"),
    ("cancel order", "change address"),
    ("track parcel", "cancel order"),
    ("track parcel", "refund"),
    ("parcel damaged", "refund"),
    ("parcel damaged", "wrong item"),
    ("transfer late", "cancel transfer"),
    ("card lost", "card declined"),
    ("unknown charge", "card lost"),
    ("unknown charge", "charged twice"),
    ("charged twice", "fees"),
    ("login", "close account"),
    ("fees", "close account"),
    ("transfer late", "unknown charge"),
    ("login", "card declined"),
)
HESITATIONS: Final[tuple[tuple[float, str], ...]] = (
    (0.5, "I (do not know|can't decide) whether to {want} or to {want2}"),
    (0.5, "maybe I should {want}, or maybe {want2}, (what is better|what do you think)?"),
    (0.5, "I (need|want) to either {want} or {want2}, whichever is (quicker|easier)"),
    (0.7, "I would like to {want}, or if that does not work, {want2}"),
    (0.7, "(can|could) I {want}? If not, I would like to {want2}"),
    (0.7, "I could {want2}, but I would rather {want}"),
    (0.8, "most likely I want to {want}, but I might have to {want2}"),
)

# The forms of a message about one intent; `2` marks the parts of the other intent, which is never the label.
PLAIN: Final = """
{fact}
{fact}. {ask}
{ask}
I (want|need|would like) to {want}
"""
NEGATED: Final = """
I (don't|do not) want to {want2}, I just want to {want}
I am not trying to {want2}, I only want to {want}
I am not asking to {want2}. {ask}
{ask} I (don't|do not) want to {want2}
(this|it) is not about {topic2}. {fact}
{fact}. (this is|it's) not about {topic2}
{deny2}. {ask}
{deny2}, but I (want|need) to {want}
{deny2}, but {fact}
{ask} {deny2}
"""
TWO_INTENTS: Final = """
{done2}, but what I really need is to {want}
{done2}. (now|today) I need something else: {ask}
{done2}. but {fact}
{ask} (by the way,|PS:) {done2}
{fact}. (please ignore|forget) my (earlier|last) message about {topic2}
I wrote about {topic2} and that is (solved|settled). now this: {fact}
first I wanted to {want2}, but (forget that|that can wait): {ask}
I also want to {want2} (some day|next month), but today I (want|need) to {want}
{ask} I no longer want to {want2}
"""

# Small talk around any message: it says nothing about the intent, but it is what embeddings see too.
OPENERS: Final = """
hi,
hello,
good morning,
hey,
hi there,
hello team,
sorry to bother you,
quick question:
so,
"""
CLOSERS: Final = """
thanks
thank you
please help
many thanks
it is urgent
please tell me
please answer soon
I am getting (worried|impatient)
"""
ASIDES: Final = """
I paid (with my card|by transfer) as always
it is a present for my {person2}
I have been (a customer|with you) for {years} years
I am (on holiday|at work) in {city2} until {nextday2}
I (wrote|called) {pastday2} and nobody answered
I did (everything|all of it) in the app
my last order with you was fine
I still have the (receipt|invoice|confirmation email)
the {item4} you sent me in spring is great
I look at my account every (day|evening)
I had to return a {item4} last year, that was easy
my {person2} lost a card once and you were quick
the courier was friendly, by the way
my {person2} had a late parcel (once|last year) too
when I moved you changed my address in a minute
the transfer to {payee3} last month was quick
the new password works well, by the way
my {person2} once got a refund within {span2}
"""

SLOTS: Final[dict[str, str]] = {
    "item": "desk lamp|kettle|garden chair|coffee grinder|keyboard|bicycle helmet|radio|blender|mirror|"
    "toaster|bookshelf|suitcase|frying pan|watch|headset|phone case|teapot|camera|printer|vase|drill|"
    "hairdryer|fan|monitor|side table|bird feeder|speaker|clock|microwave|cutting board|tripod|globe",
    "amount": "{n} euros|{n} euros|£{n}|£{n}|${n}|{n}.{cents} euros|£{n}.{cents}",
    "fee": "{small} euros|£{small}|${small}|{small}.{cents} euros|£{small}.{cents}",
    "small": "2|3|4|5|6|8|9",
    "pastday": "yesterday|on {day}|last {day}|last week|this morning|three days ago|two weeks ago|a week ago",
    "since": "since {day}|since {day}|since last week|for {span}",
    "span": "four days|five days|a week|ten days|two weeks|three weeks|a month",
    "nextday": "{day2}|the weekend|next week|my birthday|the holidays|the end of the month|tomorrow",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday",
    "payee": "my landlord|my sister|my brother|a friend|the plumber|my daughter|the dentist|the music school",
    "person": "sister|brother|mother|father|partner|neighbour|daughter|son|aunt|flatmate",
    "city": "Lisbon|Vienna|Oslo|Dublin|Prague|Athens|Lyon|Leeds|Turin|Ghent|Porto|Malmö",
    "years": "two|three|five|six|ten",
    "cents": "50|95|99|20|49",
}
