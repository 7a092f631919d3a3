"""The words that the tasks are made of: names, places, objects, countries, and pairs of words in a relation.

Every word is one run of letters, so that a tokenizer can keep it as one token.
"""

from __future__ import annotations

__all__ = [
    "CAPITALS",
    "EVENTS",
    "FRENCH",
    "NAMES",
    "OBJECTS",
    "OPPOSITES",
    "PAST",
    "PLACES",
    "PLURALS",
    "RELATIONS",
]


def _words(text: str) -> tuple[str, ...]:
    """Read words with spaces between."""
    return tuple(text.split())


def _pairs(text: str) -> dict[str, str]:
    """Read "one other, one other" as a mapping."""
    return dict(pair.split() for pair in text.replace("\n", " ").split(",") if pair.strip())


NAMES = _words("""
    John Mary Tom James Dan Sarah Anna Laura Kate Emma David Paul Mark Peter Lucy Alice Henry Jack Ruth Susan Linda
    Helen Martin George Frank Simon Kevin Brian Steven Robert William Richard Charles Daniel Michael Andrew Jason Ryan
    Jacob Adam Aaron Nathan Oliver Samuel Victor Walter Amy Julia Rachel Rebecca Maria Nancy Karen Lisa Michelle
    Jessica Jennifer Elizabeth Claire Diana Grace Sophie Olivia Victoria
""")

PLACES = _words("""
    store park school garden station office hospital restaurant house beach market library museum cafe theatre church
    bank farm airport hotel kitchen harbour
""")

# Each goes with "a".
OBJECTS = (
    *("drink", "book", "ring", "ball", "letter", "key", "gift", "flower", "snack", "necklace", "map", "coat", "hat"),
    *("ticket", "picture", "camera", "pen", "phone", "computer", "basketball", "bottle of milk", "cup of tea"),
)

# What may have lasted from one year to another.
EVENTS = _words("""
    war conflict siege reign journey voyage dynasty strike campaign project trial expedition feud tour plague drought
    alliance treaty rebellion famine marriage career dispute friendship
""")

# Countries and capitals of one word each.
CAPITALS = _pairs("""
    France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Scotland Edinburgh,
    Ireland Dublin, Wales Cardiff, Belgium Brussels, Austria Vienna, Switzerland Bern, Poland Warsaw, Hungary Budapest,
    Romania Bucharest, Bulgaria Sofia, Greece Athens, Turkey Ankara, Russia Moscow, Ukraine Kyiv, Norway Oslo,
    Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Iceland Reykjavik, Estonia Tallinn, Latvia Riga,
    Lithuania Vilnius, Croatia Zagreb, Serbia Belgrade, Slovenia Ljubljana, Slovakia Bratislava, Albania Tirana,
    Malta Valletta, Cyprus Nicosia, Egypt Cairo, Morocco Rabat, Tunisia Tunis, Libya Tripoli, Kenya Nairobi,
    Ghana Accra, Senegal Dakar, Nigeria Abuja, Uganda Kampala, Rwanda Kigali, Somalia Mogadishu, Sudan Khartoum,
    Zambia Lusaka, Angola Luanda, Namibia Windhoek, China Beijing, Japan Tokyo, Thailand Bangkok, Vietnam Hanoi,
    Mongolia Ulaanbaatar, Nepal Kathmandu, Indonesia Jakarta, Afghanistan Kabul, Iran Tehran, Iraq Baghdad,
    Syria Damascus, Lebanon Beirut, Jordan Amman, Qatar Doha, Canada Ottawa, Cuba Havana, Jamaica Kingston,
    Peru Lima, Chile Santiago, Ecuador Quito, Uruguay Montevideo, Venezuela Caracas, Colombia Bogota, Australia Canberra
""")

_OPPOSITES = _pairs("""
    old young, dark light, hot cold, big small, tall short, fast slow, hard soft, strong weak, rich poor, happy sad,
    early late, high low, wide narrow, deep shallow, full empty, open closed, clean dirty, dry wet, loud quiet,
    near far, thick thin, true false, good bad, left right, north south, buy sell, vanish appear, begin end, win lose,
    push pull, rise fall, remember forget, arrive depart, give take, love hate, laugh cry, build destroy, ask answer,
    accept refuse, borrow lend, float sink, live die, day night, war peace, friend enemy, summer winter,
    morning evening, hero villain, floor ceiling, truth lie, success failure, entrance exit
""")
# Both ways round: each word has one opposite.
OPPOSITES = _OPPOSITES | {second: first for first, second in _OPPOSITES.items()}

PLURALS = _pairs("""
    day days, night nights, war wars, friend friends, enemy enemies, summer summers, winter winters, morning mornings,
    evening evenings, hero heroes, villain villains, floor floors, ceiling ceilings, truth truths, lie lies,
    success successes, failure failures, entrance entrances, exit exits, king kings, queen queens, man men,
    woman women, child children, mouse mice, foot feet, tooth teeth, goose geese, leaf leaves, knife knives,
    wolf wolves, city cities, country countries, baby babies, box boxes, dog dogs, cat cats, house houses, tree trees,
    book books, horse horses, bird birds, apple apples, flower flowers, river rivers, mountain mountains, door doors,
    window windows, chair chairs, hand hands, eye eyes, head heads, sister sisters, brother brothers, mother mothers,
    father fathers, teacher teachers, doctor doctors, ship ships, star stars, stone stones, road roads, school schools,
    church churches, bridge bridges, island islands
""")

PAST = _pairs("""
    buy bought, sell sold, vanish vanished, appear appeared, begin began, end ended, win won, lose lost, push pushed,
    pull pulled, rise rose, fall fell, remember remembered, forget forgot, arrive arrived, depart departed, give gave,
    take took, love loved, hate hated, laugh laughed, cry cried, build built, destroy destroyed, ask asked,
    answer answered, accept accepted, refuse refused, borrow borrowed, lend lent, float floated, sink sank, live lived,
    die died, eat ate, drink drank, run ran, walk walked, sing sang, write wrote, see saw, hear heard, speak spoke,
    think thought, sleep slept, swim swam, fly flew, drive drove, break broke, choose chose, find found, make made,
    send sent, bring brought, teach taught, draw drew, throw threw, wear wore, hold held, keep kept, know knew,
    pay paid, work worked, play played, dance danced, jump jumped, cook cooked, help helped
""")

FRENCH = _pairs("""
    old vieux, young jeune, dark sombre, light clair, hot chaud, cold froid, big grand, small petit, short court,
    fast rapide, slow lent, hard dur, soft doux, strong fort, weak faible, rich riche, poor pauvre, happy heureux,
    sad triste, early tôt, late tard, high haut, low bas, wide large, narrow étroit, deep profond, full plein,
    empty vide, open ouvert, closed fermé, clean propre, dirty sale, dry sec, wet mouillé, loud bruyant, quiet calme,
    near proche, far loin, thick épais, thin mince, true vrai, false faux, good bon, bad mauvais, left gauche,
    right droite, north nord, south sud, buy acheter, sell vendre, vanish disparaître, appear apparaître,
    begin commencer, end finir, win gagner, lose perdre, push pousser, pull tirer, rise monter, fall tomber,
    forget oublier, arrive arriver, depart partir, give donner, take prendre, love aimer, hate détester, laugh rire,
    cry pleurer, build bâtir, destroy détruire, ask demander, answer répondre, accept accepter, refuse refuser,
    borrow emprunter, lend prêter, float flotter, sink couler, live vivre, die mourir, eat manger, drink boire,
    run courir, walk marcher, sing chanter, write écrire, see voir, hear entendre, speak parler, think penser,
    sleep dormir, swim nager, fly voler, drive conduire, break casser, choose choisir, find trouver, make faire,
    send envoyer, bring apporter, teach enseigner, draw dessiner, throw jeter, wear porter, hold tenir, keep garder,
    know savoir, pay payer, work travailler, play jouer, dance danser, jump sauter, cook cuisiner, help aider,
    day jour, night nuit, war guerre, peace paix, friend ami, enemy ennemi, summer été, winter hiver, morning matin,
    evening soir, hero héros, truth vérité, lie mensonge, failure échec, entrance entrée, exit sortie, king roi,
    queen reine, man homme, woman femme, child enfant, mouse souris, foot pied, tooth dent, leaf feuille,
    knife couteau, wolf loup, city ville, country pays, baby bébé, box boîte, dog chien, cat chat, house maison,
    tree arbre, book livre, horse cheval, bird oiseau, apple pomme, flower fleur, river fleuve, mountain montagne,
    door porte, window fenêtre, chair chaise, hand main, eye œil, head tête, sister sœur, brother frère, mother mère,
    father père, teacher professeur, doctor médecin, ship navire, star étoile, stone pierre, road route,
    school école, church église, bridge pont, island île, Germany Allemagne, Italy Italie, Spain Espagne,
    England Angleterre, Scotland Écosse, Ireland Irlande, Belgium Belgique, Austria Autriche, Switzerland Suisse,
    Poland Pologne, Hungary Hongrie, Romania Roumanie, Bulgaria Bulgarie, Greece Grèce, Turkey Turquie, Russia Russie,
    Norway Norvège, Sweden Suède, Finland Finlande, Denmark Danemark, Iceland Islande, Croatia Croatie, Serbia Serbie,
    Egypt Égypte, Morocco Maroc, Tunisia Tunisie, Libya Libye, China Chine, Japan Japon, Lebanon Liban,
    Jordan Jordanie, Peru Pérou, Chile Chili, Ecuador Équateur, Colombia Colombie, Australia Australie
""")

RELATIONS = {
    "opposite": OPPOSITES,
    "plural": PLURALS,
    "past": PAST,
    "french": FRENCH,
    "capital": CAPITALS,
}
